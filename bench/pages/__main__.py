"""Renders the tables of README, quick start, docs/cost.md, docs/families.md; docs/performance.md.

From the committed results, and nothing else.

python -m bench.pages            # writes them, and the pictures in docs/
python -m bench.pages --check    # exit 1 if a page and the results differ
"""

import argparse

from bench.pages import cost, families, performance, readme


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    is_check = parser.parse_args().check
    tables = {
        readme.README: readme.TABLES,
        readme.QUICKSTART: readme.OF_QUICKSTART,
        cost.PAGE: cost.TABLES,
        families.PAGE: families.TABLES,
    }
    pages = {path: readme.render(path.read_text(), made) for path, made in tables.items()}
    pages[performance.PAGE] = performance.render()
    if is_check:
        return int(any(path.read_text() != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text)
    performance.draw()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

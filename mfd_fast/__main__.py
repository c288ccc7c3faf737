"""``python -m mfd_fast`` is ``mfd-fast``; torchrun starts it by this name."""

from mfd_fast.cli import main

raise SystemExit(main())

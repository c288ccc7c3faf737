"""Runs and backbones of tiny pipelines, for the tests of families."""

from small_networks import draw_adapter
from tiny_pipelines import tiny_pipeline, tiny_size

from mfd_fast import cli
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.family import family_of

SHORT = [
    *("--resolution", "64x64", "--pipeline.dtype", "float32", "--train.device", "cpu"),
    *("--pipeline.rank", "4", "--pipeline.alpha", "4", "--distill.step-size", ".3"),
    *("--distill.aux-updates", "1", "--distill.student-steps", "2", "--num-eval-samples", "2"),
    *("--distill.student-optim.lr", ".02", "--train.log-every", "1", "--train.updates"),
]  # and how many


def saved(folder, names, prompts):
    """The folder with each pipeline as ``save_pretrained`` writes it, and prompts.txt."""
    for name in names:
        tiny_pipeline(name).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


def distil(models, name, out, *more):
    """Exit status of ``mfd-fast distill`` on a pipeline of :func:`saved`."""
    command = ["distill", str(models / name), "--prompts", str(models / "prompts.txt")]
    return cli.main([*command, "--out", str(out), *more])


def made(name, prompts, **options):
    """Family, backbone with drawn adapters of rank 2, and the condition of the prompts."""
    family = family_of(tiny_pipeline(name), **tiny_size(name))
    backbone = backbone_of(family, rank=2, **options)
    for seed, adapter in enumerate(("aux", "student")):
        draw_adapter(backbone.adapters, adapter, seed)
    return family, backbone, family.encode(prompts)

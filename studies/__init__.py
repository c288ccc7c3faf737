"""The analyses of the paper at a size that a laptop runs: one file a study, a PNG and a JSON each.

A study module has ``CLAIM`` (what the paper says), ``RULE`` (when that counts as confirmed here),
``run(seed, folder) -> figures`` (numbers ready for JSON), ``draw(figures, path)`` and
``judge(figures) -> Verdict``.
"""

STUDIES: dict[str, str] = {
    "toy-field": "toy_field",
    "loss-spread": "loss_spread",
    "jacobian": "jacobian",
    "distance": "distance",
    "step-size": "step_size",
    "max-interval": "max_interval",
    "no-auxiliary": "no_auxiliary",
    "derivative": "derivative",
    "coverage": "coverage",
    "coverage-all": "coverage_all",
    "cost": "cost",
    "evaluations": "evaluations",
    "evaluations-toys": "evaluations_toys",
    "evaluations-occfm": "evaluations_occfm",
    "evaluations-sana": "evaluations_sana",
}

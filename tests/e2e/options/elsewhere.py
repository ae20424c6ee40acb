"""Options that are not about what a run of a trainer makes: name -> where they are tested."""

from tests.e2e.options.observing import options_of

ELSEWHERE = {
    "output_dir": "where every run here is looked at",
    "debug_dataset": "tests/data/test_dataset_report.py",
    "console_log_level": "tests/config/test_log.py",
    "console_log_file": "tests/config/test_log.py",
    "console_log_simple": "tests/config/test_log.py",
    "sdpa": "the default attention; tests/models/test_sdxl.py",
    "log_every_n_steps": "tests/training/test_metrics.py",
    "max_nonfinite_steps": "tests/e2e/test_watching.py",
    "ema_device": "tests/training/test_ema.py",
    **dict.fromkeys(
        ("log_tracker_name", "log_tracker_config", "wandb_run_name", "wandb_api_key", "log_config"),
        "tests/training/test_trackers.py",
    ),
}


def options_set_here(run: str) -> list[str]:
    """The options of a run whose acting is seen in its runs."""
    return [name for name in options_of(run) if name not in ELSEWHERE]

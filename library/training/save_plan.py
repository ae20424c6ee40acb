"""What a run is going to save, in numbers: its periods settled, and whether the disk holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.training import early, free_space, naming
from library.training.precision import save_dtype
from library.training.run import Parts, Run


def save_settings(run: Run, parts: Parts) -> Any:
    """The save_* options with the period in epochs that `--save_n_epoch_ratio` comes to."""
    save = run.cfg.save
    if not save.save_n_epoch_ratio:
        return save
    period = naming.save_period_from_ratio(parts.length.num_epochs, save.save_n_epoch_ratio)
    return save.model_copy(update={"save_every_n_epochs": period})


def check_space(run: Run, parts: Parts) -> None:
    """Compare the planned saves with what is free in the output folder. Raises UserError when not one model fits."""
    settings = save_settings(run, parts)
    plan = free_space.planned(settings, total_steps=parts.length.total_steps, num_epochs=parts.length.num_epochs)
    trained = [p for group in parts.optimizer.param_groups for p in group["params"]]
    stored = list(parts.trained.state_dict().values())
    bundle = run.bundle
    if run.trainable.owns:  # the file holds the whole model, not only what is trained
        modules = (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2, bundle.vae)
        whole = [p for module in modules if module is not None for p in module.parameters()]
    else:
        whole = stored
    others = [owner.state_dict() for name, owner in parts.state.others.items() if name != "optimizer"]
    rest = free_space.tensor_bytes(others)
    per_number = free_space.optimizer_bytes(
        lambda params: early.optimizer(run.cfg, [{"name": "trial", "params": params, "lr": 1e-4}])
    )
    files = 2 if parts.ema is not None and run.cfg.ema.save_ema == "also" else 1  # the average lies beside each model
    state = free_space.weight_bytes(stored, None) + per_number * sum(p.numel() for p in trained) + rest
    files = 2 if run.cfg.ema.use_ema and run.cfg.ema.save_ema == "also" else 1  # the average is a file of its own
    free_space.check(
        Path(run.cfg.save.output_dir),
        plan,
        model_bytes=files * free_space.weight_bytes(whole, save_dtype(run.cfg.save.save_precision)),
        state_bytes=round(state),
    )

"""Names that options accept, and names that sd-scripts knows and this suite does not have yet."""

from __future__ import annotations

from pathlib import Path

from library.plugins import list_plugins

ROOT = Path(__file__).resolve().parents[2]

# sd-scripts' samplers by its names; those with k_ are the same as those without, dpmsolver++ is dpmpp_2m.
_SD_SCRIPTS_SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip
_SPREADS = ("karras", "exponential")
# Samplers that step in sigma and can take sigmas spread in another way, by a suffix: euler_karras.
_SPREAD_SAMPLERS = (
    "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc",
)  # fmt: skip
SAMPLERS = (
    *_SD_SCRIPTS_SAMPLERS, "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "lcm",
    *(f"{name}_{spread}" for spread in _SPREADS for name in _SPREAD_SAMPLERS),
)  # fmt: skip
# Those that can draw a model of rectified flow.
FLOW_SAMPLERS = ("euler", "k_euler", "ddim", "dpmsolver++", "dpmsingle", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
_ETA_SAMPLERS = {"ddim": 0.0, "euler_a": 1.0, "dpmpp_sde": 1.0}


def split_sampler(name: str) -> tuple[str, str | None]:
    """The sampler that a name of SAMPLERS stands for, by its one name, and how its sigmas are spread (None: evenly)."""
    basic, _, spread = name.rpartition("_")
    if spread not in _SPREADS:
        basic, spread = name, ""
    return {"dpmsolver++": "dpmpp_2m"}.get(basic, basic.removeprefix("k_")), spread or None


def default_eta(name: str) -> float | None:
    """The share of noise, 0 to 1, that a sampler adds when nothing is said; None for samplers that have no eta."""
    return _ETA_SAMPLERS.get(split_sampler(name)[0])


# What stays as it was when words of a prompt have weights: sd-scripts' emb_normalize_mode.
WEIGHT_BALANCES = ("original", "none", "abs")
PREDICTION_TYPES = ("epsilon", "v_prediction", "rectified_flow")

OPTIMIZERS = (
    "AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion", "Lion8bit", "PagedLion8bit",
    "SGDNesterov", "SGDNesterov8bit", "DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan",
    "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD", "Prodigy", "Adafactor", "RAdamScheduleFree", "AdamWScheduleFree",
    "SGDScheduleFree", "ProdigyPlusScheduleFree", "CAME", "AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix8bit", "Adan",
    "ADOPT", "StableAdamW", "SOAP",
)  # fmt: skip
# sd-scripts looks any other bare name up in torch.optim; these are the ones there that a training loop can step.
TORCH_OPTIMIZERS = ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay", "piecewise_constant", "rex",
    "adafactor",
)  # fmt: skip
# The classes of torch.optim.lr_scheduler that are made of literals and stepped without a measurement.
TORCH_SCHEDULERS = (
    "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR",
)  # fmt: skip

LOSSES = tuple(list_plugins(ROOT / "library" / "diffusion" / "losses"))

# Files of networks/ that are no --network_module: what to do instead.
OTHER_NETWORKS = {
    "control_net_lllite": "train it with sdxl_train_control_net_lllite.py, draw with control_net_lllite_models",
}

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
EMBEDDED_MODEL = "tiny"

# Python packages of well-known network modules, by the first word of the module's path.
NETWORK_PACKAGES = {"lycoris": "lycoris-lora"}

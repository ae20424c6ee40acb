"""The update of full fp16 with its gradient scaler, which a CPU can run too, and refusals before a model is loaded."""

import pytest
import torch

from library.config.cli import make_config
from library.errors import UserError
from library.training import build_update, early
from library.training.fused import FusedUpdate
from library.training.precision import cast_trained, fp16_gradient_scaler, precision_text, trained_dtype
from library.training.tensor_step import Widening
from library.training.update import GuardedUpdate, total_norm


def _config(tmp_path, run="sdxl_train_network", **changes):
    (tmp_path / "images" / "1_a").mkdir(parents=True, exist_ok=True)
    values = {
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": str(tmp_path / "images"),
        "resolution": 64,
        "output_dir": str(tmp_path),
    }
    if run == "sdxl_train_network":
        values["network_module"] = "networks.lora"
    return make_config(run, **{**values, **changes})


def _built(cfg, optimizer):
    return build_update.build_update(cfg, early.optimizer, optimizer, scaler=None, run_seed=1, global_step=lambda: 0)


# Full fp16 ---------------------------------------------------------------------


def _fp16_update(scaler):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 300).half())
    optimizer = torch.optim.AdamW([p], lr=0.05, fused=True)
    widening = Widening(1, lambda: 0, stochastic=False)
    return p, GuardedUpdate(optimizer, 1.0, scaler, widening)


def test_full_fp16_unscales_clips_and_steps_in_float32():
    scaler = fp16_gradient_scaler("cpu")
    p, update = _fp16_update(scaler)
    reference = torch.nn.Parameter(p.detach().float())
    plain = GuardedUpdate(torch.optim.AdamW([reference], lr=0.05, fused=True), 1.0)
    for _ in range(5):
        scaler.scale((p.float() * torch.linspace(0, 3e-4, 300)).sum()).backward()
        assert p.grad.dtype == torch.float16
        norm = update()
        (reference * torch.linspace(0, 3e-4, 300)).sum().backward()
        # Gradients of fp16 are exact to 11 bits.
        torch.testing.assert_close(norm, plain(), rtol=2e-3, atol=0)
    assert p.dtype == torch.float16 and float(update.skipped) == 0
    torch.testing.assert_close(p.detach().float(), reference.detach(), rtol=0, atol=5e-3)
    # The second moments of these gradients, 9e-11 and less, are nothing in fp16.
    assert update.optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


def test_full_fp16_skips_an_overflow_and_halves_the_scale():
    scaler = fp16_gradient_scaler("cpu")
    p, update = _fp16_update(scaler)
    before = p.detach().clone()
    scaler.scale(p.float().sum() * 1e3).backward()  # 65,536,000 is beyond fp16
    update()
    assert torch.equal(p, before) and not update.optimizer.state[p]
    assert float(update.skipped) == 1 and float(update.last_bad) == 1
    assert scaler.get_scale() == 2.0**15
    scaler.scale(p.float().sum() * 1e-3).backward()
    update()
    assert not torch.equal(p, before) and float(update.last_bad) == 0


def test_torch_itself_refuses_gradients_in_fp16():
    """The reason for a scaler of our own; when this fails, it may go."""
    scaler = torch.amp.GradScaler("cpu")
    p, update = _fp16_update(scaler)
    scaler.scale(p.float().sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        update()


def test_the_norm_of_float32_gradients_is_torchs_own_to_the_bit():
    grads = [torch.randn(n, n, generator=torch.Generator().manual_seed(n)) for n in (3, 50, 200)]
    assert torch.equal(total_norm(grads), torch.nn.utils.get_total_norm(grads))
    assert float(total_norm([])) == 0


# Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        ({}, torch.float32, "mixed precision no, trained weights float32, frozen weights float32"),
        (
            {"mixed_precision": "bf16", "full_bf16": True},
            torch.bfloat16,
            "mixed precision bf16, trained weights bfloat16, frozen weights bfloat16, stochastic rounding",
        ),
        (
            {"mixed_precision": "fp16", "full_fp16": True, "fp8_base_unet": True},
            torch.float16,
            "mixed precision fp16, trained weights float16, frozen weights float16 and float8 (U-Net)",
        ),
    ],
)
def test_trained_weights_have_the_dtype_that_the_settings_say(tmp_path, changes, dtype, words):
    cfg = _config(tmp_path, **changes)
    module = torch.nn.Linear(2, 2)
    cast_trained(module.parameters(), trained_dtype(cfg))
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert precision_text(cfg) == words


def test_settings_choose_the_update(tmp_path):
    def update(**changes):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2)) for _ in range(6)])
        return _built(_config(tmp_path, **changes), optimizer)

    bf16 = {"mixed_precision": "bf16", "full_bf16": True}
    plain = update(max_grad_norm=0.5)
    assert isinstance(plain, GuardedUpdate) and plain.max_norm == 0.5 and plain.widening is None
    full = update(**bf16)
    assert full.widening.stochastic and full.by_tensor
    assert update(**bf16, stochastic_rounding=False).widening is None
    assert not update(**bf16, optimizer_type="prodigyopt.Prodigy").by_tensor
    fp16 = update(mixed_precision="fp16", full_fp16=True)
    assert fp16.widening is not None and not fp16.widening.stochastic
    fused = update(**bf16, fused_backward_pass=True, fused_optimizer_groups=2)
    assert isinstance(fused, FusedUpdate) and fused.num_groups is None and fused.widening.stochastic
    assert update(fused_optimizer_groups=2).num_groups == 2


class LayerwiseNorm(torch.optim.SGD):
    """Looks across tensors, which no name tells."""

    def step(self, closure=None):
        """Scale all gradients by their common norm, then step."""
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        return super().step(closure)


@pytest.mark.parametrize(
    ("changes", "processes", "what"),
    [
        ({"fused_backward_pass": True}, 2, "fused_backward_pass needs a single process"),
        ({"fused_optimizer_groups": 3}, 2, "fused_optimizer_groups needs a single process"),
        (
            {"fused_backward_pass": True, "optimizer_type": f"{__name__}.LayerwiseNorm"},
            1,
            "cannot be stepped one tensor after the other: how a tensor moves depends on the other tensors",
        ),
    ],
)
def test_a_fused_update_that_cannot_be_right_is_refused_before_loading(tmp_path, changes, processes, what):
    cfg = _config(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        build_update.check(cfg, early.optimizer, num_processes=processes)
    assert what in caught.value.problems[0].what
    build_update.check(_config(tmp_path, optimizer_type=cfg.optim.optimizer_type), early.optimizer, num_processes=2)

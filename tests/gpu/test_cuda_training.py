"""What only a GPU can show. Skipped without CUDA."""

import pytest
import torch
from safetensors.torch import load_file

from library.training.ema import Decay, Ema
from library.training.optim import build_optimizer
from library.training.update import GuardedUpdate

pytestmark = pytest.mark.gpu


def test_fused_updates_skip_a_non_finite_gradient_on_the_device():
    parameter = torch.nn.Parameter(torch.ones(64, 64, device="cuda"))
    group = {"name": "unet", "params": [parameter], "lr": 0.1}
    optimizer = build_optimizer([group], optimizer_type="AdamW", learning_rate=0.1, arguments={})
    update = GuardedUpdate(optimizer, 1.0)
    parameter.grad = torch.full_like(parameter, float("inf"))
    update()
    assert torch.equal(parameter, torch.ones_like(parameter)) and float(update.skipped) == 1
    parameter.grad = torch.ones_like(parameter)
    update()
    assert (parameter < 1).all() and torch.isfinite(parameter).all()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_lora_run_in_each_precision_stays_close_to_float32(train, precision):
    reference = load_file(train("reference", "--max_train_steps=8", "--learning_rate=1e-3") / "net.safetensors")
    got = load_file(
        train("got", "--max_train_steps=8", "--learning_rate=1e-3", f"--mixed_precision={precision}")
        / "net.safetensors"
    )
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    up = [name for name in got if name.endswith("lora_up.weight")]
    a, b = (torch.cat([tensors[name].flatten().float() for name in up]) for tensors in (reference, got))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > (0.999 if precision == "no" else 0.8)


def test_eight_bit_optimizer_trains(train):
    tensors = load_file(train("out", "--max_train_steps=4", "--optimizer_type=AdamW8bit") / "net.safetensors")
    assert any(float(value.abs().max()) > 0 for name, value in tensors.items() if name.endswith("lora_up.weight"))


def test_sample_pictures_are_drawn_on_the_gpu(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1\n")
    flags = [f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--mixed_precision=bf16"]
    output = train("out", "--max_train_steps=2", *flags)
    assert len(list((output / "sample").glob("*.png"))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_average_of_weights_on_the_gpu_is_that_on_the_cpu(dtype, on_cpu):
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(1000, 1000, generator=generator).to(dtype) for name in ("a", "b", "c")}
    moves = [torch.randn(1000, 1000, generator=generator).to(dtype) for _ in range(12)]
    averages = []
    for device, offload in (("cpu", False), ("cuda", on_cpu)):
        params = {name: torch.nn.Parameter(value.to(device)) for name, value in start.items()}
        ema = Ema(params, Decay(highest=0.9), interval=2, on_cpu=offload)
        for step, move in enumerate(moves, 1):
            skipped = step == 5
            ema.before_weights_change()
            with torch.no_grad():
                for p in params.values():
                    p.add_(0 if skipped else move.to(device))
            ema.update(step, was_skipped=torch.tensor(float(skipped), device=device))
        live = {name: p.detach().clone() for name, p in params.items()}
        with ema.swapped():
            for name, p in params.items():
                assert p.is_cuda == (device == "cuda")
                torch.testing.assert_close(p.detach().float(), ema.average()[name].to(device, dtype).float())
        assert all(torch.equal(p, live[name]) for name, p in params.items())
        averages.append({name: value.cpu() for name, value in ema.average().items()})
    for name in start:
        torch.testing.assert_close(averages[0][name], averages[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_a_run_with_an_average_resumes_exactly_on_the_gpu(train, device):
    flags = ["--max_train_steps=6", "--use_ema", f"--ema_device={device}", "--ema_update_interval=2", "--save_state"]
    whole = train("whole", *flags, "--save_every_n_steps=3")
    resumed = train("resumed", *flags, f"--resume={whole / 'net-step00000003-state'}")
    for name in ("net.safetensors", "net-ema.safetensors"):
        expected, got = load_file(whole / name), load_file(resumed / name)
        assert all(torch.allclose(expected[key], got[key], rtol=1e-3, atol=1e-5) for key in expected)

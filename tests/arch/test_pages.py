"""What the pages tell users to write works: the README's TOML files, and the plugins of docs/extending.md."""

import re
import tomllib
from types import ModuleType

import pytest
import torch

from tests.arch import tree


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page in one language, in order."""
    text = (tree.ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def plugin(page: str, docstring: str) -> ModuleType:
    """The module that a page shows, found by the beginning of its docstring."""
    source = next(block for block in blocks(page, "python") if block.startswith(f'"""{docstring}'))
    module = ModuleType("shown")
    exec(compile(source, page, "exec"), module.__dict__)
    return module


def test_the_readme_run_is_valid(tmp_path, monkeypatch):
    from PIL import Image

    from library.config.cli import parse
    from library.config.dataset_file import dataset_specs
    from library.sizes import Size

    dataset, run = blocks("README.md", "toml")
    (tmp_path / "pictures" / "mug").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "mug" / "one.png")
    (tmp_path / "models").mkdir()
    (tmp_path / tomllib.loads(run)["pretrained_model_name_or_path"]).touch()
    (tmp_path / "dataset.toml").write_text(dataset, encoding="utf-8")
    (tmp_path / "run.toml").write_text(run, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    cfg = parse("sdxl_train_network", ["--config_file", "run.toml"])
    assert cfg.network.network_dim == 16
    (spec,) = dataset_specs(cfg)
    assert spec.resolution == Size(1024, 1024)
    assert spec.subsets[0].class_tokens == "a zxq mug"


def test_the_demo_run_is_valid(monkeypatch):
    from library.config.cli import parse
    from library.config.dataset_file import dataset_specs

    monkeypatch.chdir(tree.ROOT)
    for run in ("sdxl_train_network", "cache_latents", "cache_text_encoder_outputs"):
        (spec,) = dataset_specs(parse(run, ["--config_file", "demo/lora.toml"]))
        assert [subset.num_repeats for subset in spec.subsets] == [10]


def test_the_loss_of_the_page_is_a_loss():
    loss = plugin("docs/extending.md", "Cauchy loss")
    pred, target = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    result = loss.elementwise(pred.half(), target)
    assert result.dtype == torch.float32
    assert result.tolist() == [[0.0, pytest.approx(2.302585)]]


def test_the_network_of_the_page_trains_only_its_up_weights():
    from networks._keys import AdapterRoot

    network_module = plugin("docs/extending.md", "LoRA whose down weights")
    unet = torch.nn.Module()
    unet.block = type("Transformer2DModel", (torch.nn.Module,), {})()  # the class by which targets are found
    unet.block.to_q = torch.nn.Linear(8, 8)
    network = network_module.create([AdapterRoot("unet", "lora_unet", unet)], dim=2, alpha=1.0)
    trained = {name.rsplit(".", 2)[-2] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"lora_up"}
    tensors, _ = network.export()
    again = network_module.create_from_weights([AdapterRoot("unet", "lora_unet", unet)], tensors)
    assert set(again.export()[0]) == set(tensors)

"""The hub: which files are fetched, and what is said when nothing can be."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from library.errors import UserError
from library.models import checkpoint, hub
from library.models.bundle import ModelBundle

REPOSITORY = [
    "README.md", "model_index.json", "scheduler/scheduler_config.json", "sd_xl_base.safetensors",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin", "unet/model.onnx", "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors", "text_encoder_2/config.json", "text_encoder_2/pytorch_model.bin",
    "vae/config.json", "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
]  # fmt: skip
INDEX = {"model_index.json", "scheduler/scheduler_config.json"}
CONFIGS = {f"{name}/config.json" for name in ("unet", "text_encoder", "text_encoder_2", "vae")}


@pytest.mark.parametrize(
    ("parts", "half", "weights"),
    [
        (("unet",), False, {"unet/diffusion_pytorch_model.safetensors"}),
        (("unet",), True, {"unet/diffusion_pytorch_model.fp16.safetensors"}),
        (("text_encoder_1",), False, {"text_encoder/model.fp16.safetensors"}),
        (("text_encoder_2",), True, {"text_encoder_2/pytorch_model.bin"}),
        (("vae",), True, {f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}),
    ],
)
def test_only_the_needed_files_are_fetched(parts, half: bool, weights: set[str]):
    files = hub.model_files(REPOSITORY, parts, half=half, repo="o/m")
    assert set(files) == INDEX | CONFIGS | weights and len(files) == len(set(files))


def test_a_vae_lies_at_the_root_or_in_its_folder():
    assert "vae/config.json" in hub.vae_files(REPOSITORY, half=False, repo="o/m")
    root = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors"]
    assert hub.vae_files(root, half=True, repo="o/v") == ["config.json", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(UserError, match="no diffusers VAE"):
        hub.vae_files(["README.md"], half=True, repo="o/v")
    with pytest.raises(UserError, match="not a diffusers model"):
        hub.model_files(["sd_xl_base.safetensors"], ("unet",), half=True, repo="o/m")


def test_an_id_is_downloaded_and_loaded(folder: Path, bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    asked = {}
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: names)

    def fetch(repo: str, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = checkpoint.load_bundle("owner/model", vae="owner/vae", parts=("vae",))
    assert (
        torch.equal(loaded.vae.decoder.conv_out.weight, bundle.vae.decoder.conv_out.weight)
        and loaded.source == "owner/model"
    )
    assert not any("unet/diffusion" in name for name in asked["owner/model"])
    assert set(asked["owner/vae"]) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def test_an_id_that_does_not_exist_is_explained(monkeypatch: pytest.MonkeyPatch):
    def refuse(self, repo: str) -> list[str]:
        raise RepositoryNotFoundError("404", response=_Response())

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(UserError, match="no such file, folder or hub model"):
        checkpoint.load_bundle("owner/typo")


def test_without_a_connection_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub cannot be reached"):
        checkpoint.load_bundle("owner/model-that-is-not-cached")


class _Response:
    """What the hub's exceptions look at."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request, self.status_code, self.text = None, 404, ""


def test_what_looks_like_a_hub_id():
    assert hub.looks_like_id("stabilityai/stable-diffusion-xl-base-1.0")
    for name in ("tiny", "models/x.safetensors", "/abs/path", "a/b/c", "./a/b", "folder/", "x.ckpt"):
        assert not hub.looks_like_id(name)

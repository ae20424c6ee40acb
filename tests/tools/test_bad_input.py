"""Files that do not fit or are broken, and arguments that make no sense: named, with the way out, nothing written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import check_lora, extract_lora, merge_lora, resize_lora, svd_merge_lora

NAME = "lora_unet_middle_block_1_proj_in"


def into_checkpoint(base, lora, out):
    argv = ["--sd_model", str(base), "--models", str(lora), "--ratios", "1", "--save_to", str(out)]
    return merge_lora.main(argv)


def into_lora(base, lora, out):
    return merge_lora.main(["--models", str(lora), "--ratios", "1", "--save_to", str(out)])


def resized(base, lora, out):
    return resize_lora.main(["--model", str(lora), "--new_rank", "1", "--save_to", str(out)])


EVERY = [into_checkpoint, into_lora, resized]
MERGES = [into_checkpoint, into_lora]


def refused(tool, base, lora, folder, capsys):
    """What the tool says; it must refuse and leave nothing behind."""
    before = sorted(folder.iterdir())
    assert tool(base, lora, folder / "out.safetensors") == 2
    assert sorted(folder.iterdir()) == before
    return capsys.readouterr().err


@pytest.mark.parametrize("tool", EVERY)
def test_nan(tool, base, few, tmp_path, capsys, changed):
    key = f"{NAME}.lora_up.weight"
    path = changed(few, {key: load_file(few)[key] * float("nan")})
    said = refused(tool, base, path, tmp_path, capsys)
    assert f"{key} holds NaN or infinity" in said and "use an earlier save" in said


@pytest.mark.parametrize("tool", EVERY)
def test_an_alpha_that_is_no_number(tool, base, few, tmp_path, capsys, changed):
    path = changed(few, {f"{NAME}.alpha": torch.ones(4)})
    assert f"{NAME}.alpha has shape (4,)" in refused(tool, base, path, tmp_path, capsys)


def test_a_missing_alpha_is_told_once(base, few, tmp_path, capsys, changed):
    path = changed(few, {key: None for key in load_file(few) if key.endswith(".alpha")})
    assert into_checkpoint(base, path, tmp_path / "out.safetensors") == 0
    said = capsys.readouterr().err
    assert said.count("no alpha") == 1


@pytest.mark.parametrize("tool", EVERY)
def test_rank_0(tool, base, few, tmp_path, capsys, changed):
    path = changed(few, {f"{NAME}.lora_down.weight": torch.zeros(0, 80), f"{NAME}.lora_up.weight": torch.zeros(80, 0)})
    assert f"{NAME} has rank 0" in refused(tool, base, path, tmp_path, capsys)


@pytest.mark.parametrize("tool", EVERY)
def test_factors_that_do_not_fit_or_are_missing(tool, base, few, tmp_path, capsys, changed):
    path = changed(few, {f"{NAME}.lora_down.weight": torch.zeros(3, 80)})
    assert "do not fit each other" in refused(tool, base, path, tmp_path, capsys)
    path = changed(few, {f"{NAME}.lora_down.weight": None})
    assert f'"{NAME}.lora_down.weight" is missing' in refused(tool, base, path, tmp_path, capsys)


@pytest.mark.parametrize("tool", EVERY)
def test_a_file_that_was_cut_short(tool, base, few, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(few.read_bytes()[:-100])
    said = refused(tool, base, path, tmp_path, capsys)
    assert "cut short" in said and str(path) in said and "again" in said


@pytest.mark.parametrize("tool", EVERY)
def test_other_kinds_of_files(tool, base, few, tmp_path, capsys, changed):
    assert "not a LoRA" in refused(tool, base, base, tmp_path, capsys)
    path = changed(few, {f"{NAME}.hada_w1_a": torch.zeros(1)})
    assert "a LoHa" in refused(tool, base, path, tmp_path, capsys)


@pytest.mark.parametrize("tool", MERGES)
def test_names_of_other_models_and_two_prefixes(tool, base, few, tmp_path, capsys, changed):
    pair = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    for module, says in (
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "Stable Diffusion 1.x"),
        ("unet_middle_block_1_proj_in", "does not begin with lora_unet_"),
    ):
        path = changed(few, {f"{module}.{tail}": value for tail, value in pair.items()})
        said = refused(tool, base, path, tmp_path, capsys)
        assert module in said and says in said and "fix:" in said


@pytest.mark.parametrize("tool", MERGES)
def test_a_module_under_two_names(tool, base, few, tmp_path, capsys, changed):
    other = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = load_file(few)
    path = changed(few, {key.replace(NAME, other): value for key, value in tensors.items() if key.startswith(NAME)})
    said = refused(tool, base, path, tmp_path, capsys)
    assert NAME in said and other in said and "twice" in said


def test_another_width_and_nothing_that_fits(base, few, tmp_path, capsys, changed):
    wide = {f"{NAME}.lora_down.weight": torch.ones(4, 1280), f"{NAME}.lora_up.weight": torch.ones(1280, 4)}
    said = refused(into_checkpoint, base, changed(few, wide), tmp_path, capsys)
    assert f"{NAME} is for a weight of shape (1280, 1280), this model's is (80, 80)" in said
    save_file(
        {key.replace("middle_block_1", "middle_block_7"): v for key, v in wide.items()}, tmp_path / "no.safetensors"
    )
    said = refused(into_checkpoint, base, tmp_path / "no.safetensors", tmp_path, capsys)
    assert "none of its 1 modules is in this model" in said


def test_a_missing_alpha_is_the_rank_and_is_told(base, few, tmp_path, caplog, changed):
    path = changed(few, {f"{NAME}.alpha": None})
    with caplog.at_level("WARNING"):
        assert into_lora(base, path, tmp_path / "out.safetensors") == 0
    assert f"1 of {len(load_file(few)) // 3} modules have no alpha: the rank is used" in caplog.text
    found, given = load_file(tmp_path / "out.safetensors"), load_file(few)
    delta = found[f"{NAME}.lora_up.weight"] @ found[f"{NAME}.lora_down.weight"]
    assert torch.allclose(delta, given[f"{NAME}.lora_up.weight"] @ given[f"{NAME}.lora_down.weight"], atol=1e-6)


def test_loras_of_models_of_different_widths(few, tmp_path, capsys, changed):
    wide = {f"{NAME}.lora_down.weight": torch.ones(4, 1280), f"{NAME}.lora_up.weight": torch.ones(1280, 4)}
    argv = [
        "--models",
        str(few),
        str(changed(few, wide)),
        "--ratios",
        "1",
        "1",
        "--save_to",
        str(tmp_path / "o.safetensors"),
    ]
    assert merge_lora.main(argv) == 2
    assert "(1280, 1280)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "argv", "says"),
    [
        (merge_lora, "--models FEW FEW --ratios 1 --save_to O.safetensors", "2 models, 1 ratios"),
        (merge_lora, "--ratios 1 --save_to O.safetensors", "no LoRA is given"),
        (merge_lora, "--models FEW --ratios nan --save_to O.safetensors", "not a finite number"),
        (
            merge_lora,
            "--models FEW --ratios 1 --lbws [1,2] --save_to O.safetensors",
            "a list of block weights has 2 weights",
        ),
        (merge_lora, "--models FEW --ratios 1 --lbws [1] [1] --save_to O.safetensors", "1 models, 2 lbws"),
        (merge_lora, "--models nowhere --ratios 1 --save_to O.safetensors", "there is no file nowhere"),
        (merge_lora, "--models FEW --ratios 1 --save_to O.ckpt", "never written"),
        (merge_lora, "--models FEW --ratios 1", "no name for the result"),
        (merge_lora, "--models FEW --ratios 1 --concat --new_rank 2 --save_to O.safetensors", "--concat keeps all"),
        (merge_lora, "--models FEW --ratios 1 --new_conv_rank 2 --save_to O.safetensors", "needs --new_rank"),
        (merge_lora, "--sd_model tiny --models FEW --ratios 1 --shuffle --save_to O.safetensors", "--shuffle is for"),
        (merge_lora, "--sd_model nowhere --models FEW --ratios 1 --save_to O.safetensors", "no such checkpoint"),
        (svd_merge_lora, "--models FEW --ratios 1 --new_rank 0 --save_to O.safetensors", "new_rank is 0"),
        (extract_lora, "--model_org tiny --model_tuned tiny --v2 --save_to O.safetensors", "Stable Diffusion 2.x"),
        (extract_lora, "--model_org tiny --model_tuned tiny --dim 0 --save_to O.safetensors", "dim is 0"),
        (
            extract_lora,
            "--model_org a --model_tuned b --clamp_quantile 0 --save_to O.safetensors",
            "clamp_quantile is 0",
        ),
        (resize_lora, "--model FEW --dynamic_method sv_fro --save_to O.safetensors", "needs --dynamic_param"),
        (resize_lora, "--model FEW --dynamic_param 2 --save_to O.safetensors", "needs --dynamic_method"),
        (resize_lora, "--model FEW --dynamic_method sv_fro --dynamic_param 9 --save_to O.safetensors", "no share"),
        (
            resize_lora,
            "--model FEW --dynamic_method sv_ratio --dynamic_param 0.5 --save_to O.safetensors",
            "keeps nothing",
        ),
        (resize_lora, "--model FEW --device nowhere --save_to O.safetensors", "device nowhere cannot be used"),
        (check_lora, "FEW --png picture.jpg", "no name of a PNG file"),
    ],
)
def test_arguments(tool, argv, says, few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool.main(argv.replace("FEW", str(few)).split()) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

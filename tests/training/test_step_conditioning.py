"""What the U-Net of one training step is told of text and sizes equals what diffusers' SDXL pipeline would tell it."""

import torch
from diffusers import StableDiffusionXLPipeline

from library.config.cli import make_config
from library.models import checkpoint
from library.training import launch
from library.training.prepare import prepare
from library.training.trainables.full import FullTrainable
from tests.data.specs import write_picture


def test_size_ids_and_text_are_those_of_the_diffusers_pipeline(tmp_path, monkeypatch):
    caption = "a red circle on a white background, best quality"
    write_picture(tmp_path / "images" / "1_a" / "a.png", 200, 120, caption=caption, seed=1)
    cfg = make_config(
        "sdxl_train", pretrained_model_name_or_path="tiny", train_data_dir=str(tmp_path / "images"), resolution=96,
        enable_bucket=True, min_bucket_reso=32, max_bucket_reso=192, bucket_reso_steps=32, caption_extension=".txt",
        output_dir=str(tmp_path / "out"), max_train_steps=1, max_data_loader_n_workers=0, learning_rate=1e-5, seed=1,
    )  # fmt: skip
    told, data = {}, []

    def spying(*arguments):
        run = prepare(*arguments)
        run.bundle.unet.register_forward_pre_hook(lambda module, args, kwargs: told.update(kwargs), with_kwargs=True)
        data.append(run.data)
        return run

    monkeypatch.setattr(launch, "prepare", spying)
    launch.train(cfg, FullTrainable(cfg))

    (image,) = [data[0].table[row] for row in data[0].table.rows.tolist()]
    placement = image.placement
    left, top = ((a - b) // 2 for a, b in zip(placement.resized, placement.bucket, strict=True))
    assert (left, top) != (0, 0), "the picture is cropped"
    bundle = checkpoint.load_bundle("tiny")
    checkpoint.save_diffusers(bundle, tmp_path / "folder")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    hidden, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    ids = pipeline._get_add_time_ids(
        (120, 200), (top, left), (placement.bucket.h, placement.bucket.w), torch.float32,
        text_encoder_projection_dim=pooled.shape[-1],
    )  # fmt: skip
    assert told["added_cond_kwargs"]["time_ids"].float().tolist() == ids.tolist()
    torch.testing.assert_close(told["encoder_hidden_states"], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told["added_cond_kwargs"]["text_embeds"], pooled, rtol=1e-5, atol=1e-5)

"""Options about the files that a run writes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import Group, option


class SaveOptions(Group):
    """What is saved, when, under which name, and what is said about it inside."""

    title: ClassVar[str] = "saving"

    output_dir: str | None = option(None, "folder for models, states and sample pictures", path=True)
    output_name: str | None = option(None, "name of the model files (unset: `last`, `epoch` or `at`)")
    save_precision: str | None = option(
        None, "number format in the file (unset: as trained)", choices=["float", "fp16", "bf16"]
    )
    save_model_as: str | None = option(
        None,
        "file format: a single file, a diffusers folder for the full fine-tune (unset: as the base model was), or a "
        "PyTorch file (pt) for embeddings",
        choices=["safetensors", "diffusers", "diffusers_safetensors", "pt"],
    )
    save_every_n_epochs: int | None = option(None, "save after every Nth epoch", ge=1, zero_is_unset=True)
    save_every_n_steps: int | None = option(None, "save after every Nth step", ge=1, zero_is_unset=True)
    save_n_epoch_ratio: int | None = option(
        None, "save about this often in total, at ends of epochs", ge=1, zero_is_unset=True
    )
    save_last_n_epochs: int | None = option(
        None, "of the epoch files, keep only the last N epochs'", ge=1, zero_is_unset=True
    )
    save_last_n_epochs_state: int | None = option(None, "the same for state folders", ge=1, zero_is_unset=True)
    save_last_n_steps: int | None = option(
        None, "of the step files, keep only those of the last N steps", ge=1, zero_is_unset=True
    )
    save_last_n_steps_state: int | None = option(None, "the same for state folders", ge=1, zero_is_unset=True)
    save_state: bool = option(False, "with every saved model, and at the end, also save all that --resume needs")
    save_state_on_train_end: bool = option(False, "save what --resume needs at the end only")
    metadata_title: str | None = option(None, "modelspec title (unset: output_name)")
    metadata_author: str | None = option(None, "modelspec author")
    metadata_description: str | None = option(None, "modelspec description")
    metadata_license: str | None = option(None, "modelspec license")
    metadata_tags: str | None = option(None, "modelspec tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "modelspec usage hint")
    metadata_thumbnail: str | None = option(None, "modelspec thumbnail: an image file or a data: URL")
    metadata_merged_from: str | None = option(None, "modelspec list of models that this one was merged from")
    metadata_trigger_phrase: str | None = option(None, "modelspec trigger phrase")
    metadata_preprocessor: str | None = option(None, "modelspec preprocessor")
    metadata_is_negative_embedding: str | None = option(None, "modelspec mark of negative embeddings")

    @field_validator("save_model_as", mode="before")
    @classmethod
    def _no_pickle(cls, value: object) -> object:
        if value == "ckpt":
            raise ValueError("would be a pickle file, which can run code when opened; only safetensors is written")
        return value

    @field_validator("output_name")
    @classmethod
    def _a_name_not_a_path(cls, value: str | None) -> str | None:
        if value and ("/" in value or "\\" in value):
            raise ValueError("is a path; the folder belongs in output_dir")
        return value

    def modelspec_fields(self) -> dict[str, str]:
        """The metadata_* options that are set, without their prefix."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name.startswith("metadata_")}
        return {name.removeprefix("metadata_"): value for name, value in named.items() if value is not None}

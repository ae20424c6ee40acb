"""Prompts out of pictures: the text that this suite, sd-scripts, A1111 and others leave in a file. No torch.

Of sd-scripts' chunks, and of A1111's text where there are none, the prompt and the negative prompt are taken; sizes,
seeds, steps and samplers are not, unless they stand in the prompt as options. Source: gen_img.md §2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from library.data.folder_listing import list_folder
from library.errors import Problem, UserError
from library.inference.parameters_text import read_parameters
from library.inference.prompt_source import PromptLine
from library.inference.writer import PARAMETERS
from library.log import get_logger

logger = get_logger(__name__)

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_CODES = {b"UNICODE\0": "", b"ASCII\0\0\0": "ascii", b"\0\0\0\0\0\0\0\0": "utf-8"}
_NETWORK_TAG = re.compile(r"\s*<(?:lora|lyco|hypernet):[^<>]*>")


def prompts_of_pictures(paths: Sequence[Path | str]) -> list[PromptLine]:
    """One prompt line for each picture, in order; a folder stands for its pictures, by name.

    Raises UserError that names every file that cannot be read or holds no prompt, and folders without pictures.
    """
    lines: list[PromptLine] = []
    problems: list[Problem] = []
    for path in map(Path, paths):
        files = [path / name for name in list_folder(str(path)).images] if path.is_dir() else [path]
        if not files:
            problems.append(Problem("the folder holds no picture", str(path), "name one with pictures"))
        for file in files:
            try:
                line = line_of(texts_of(file), where=str(file))
            except UserError as error:
                problems += error.problems
                continue
            if line is None:
                fix = "give --prompt or --from_file, or take pictures that generators have written"
                problems.append(Problem("the picture's text holds no prompt", str(file), fix))
            else:
                lines.append(line)
    if problems:
        raise UserError.from_problems(problems)
    return lines


def texts_of(path: Path) -> dict[str, str]:
    """The text chunks of a PNG, or what stands in the EXIF UserComment of any picture, as `parameters`; {} for none.

    Raises UserError when the file is missing or no picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.format == "PNG" and not {"prompt", PARAMETERS} & picture.info.keys():
                picture.load()  # chunks may follow the pixels
            texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except FileNotFoundError:
        raise UserError("the picture does not exist", str(path), "check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the picture cannot be read ({error})", str(path), "check the file") from None
    if PARAMETERS not in texts and (said := comment_text(comment)):
        texts[PARAMETERS] = said
    return texts


def comment_text(comment: bytes | str | None) -> str:
    """The text of an EXIF UserComment; "" when there is none or it cannot be read.

    A1111 writes UTF-16 in big-endian order whatever the order of the file; others write the file's. The letters of
    most texts are below 256, so the place of the zero bytes tells.
    """
    if isinstance(comment, str):
        return comment.strip("\0 ")
    if not comment or comment[:8] not in _CODES:
        return (comment or b"").decode(errors="replace").strip("\0 ")
    code, body = _CODES[comment[:8]], comment[8:]
    if not code:
        code = "utf-16" if body[:2] in (b"\xff\xfe", b"\xfe\xff") else _order(body)
    return body.decode(code, errors="replace").strip("\0 ")


def line_of(texts: Mapping[str, str], *, where: str) -> PromptLine | None:
    r"""The prompt line of a picture's texts, None when they hold no prompt.

    Braces are escaped: what was chosen from is no longer a choice. Line ends become spaces, and A1111's `<lora:…>` are
    left out, since networks are loaded by options.
    """
    if "prompt" in texts and not _is_workflow(texts["prompt"]):
        prompt, negative = texts["prompt"], texts.get("negative-prompt", "")
    elif PARAMETERS in texts:
        prompt, negative, _ = read_parameters(texts[PARAMETERS])
        if _NETWORK_TAG.search(prompt):
            logger.warning("networks that the prompt names are not loaded by it: %s", where)
            prompt = _NETWORK_TAG.sub("", prompt)
    else:
        return None
    prompt, negative = (re.sub(r"(?<!\\)([{}])", r"\\\1", " ".join(text.split())) for text in (prompt, negative))
    if not prompt and not negative:
        return None
    return PromptLine(f"{prompt} --n {negative}".strip() if negative else prompt, where)


def _is_workflow(text: str) -> bool:
    """Whether a `prompt` chunk is ComfyUI's, which is a program in JSON."""
    return text.lstrip().startswith('{"')


def _order(body: bytes) -> str:
    return "utf-16-le" if body[1::2].count(0) > body[::2].count(0) else "utf-16-be"

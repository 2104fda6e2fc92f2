"""Opens rapidocr on onnxruntime: one thread a reader, and nothing that falls back in silence."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from duet.configs.environment import require_gpus_allowed
from duet.configs.errors import UserError

Reader = Callable[[np.ndarray], Any]  # rapidocr.RapidOCR: BGR pixels in, .txts out
DET_SIZES = ("tiny", "small", "medium")  # PP-OCRv6's; the package carries `small`
ENGINES = ("cpu", "cuda")


def open_reader(limit_side_len: int, language: str, det_size: str, engine: str) -> Reader:
    """Raises UserError for an unknown language, no GPU runtime, models that cannot be had."""
    from rapidocr import RapidOCR
    from rapidocr.utils.download_file import DownloadFileException
    from rapidocr.utils.typings import ModelType

    params = {
        "Global.use_cls": False,
        "Global.log_level": "error",
        "Det.limit_type": "max",
        "Det.limit_side_len": limit_side_len,
        "Det.model_type": ModelType(det_size),
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    if engine == "cuda":
        params |= _on_cuda()
    reader = RapidOCR(params=params | _recogniser(language))
    try:
        reader(_word())  # rapidocr opens its models at the first word that it reads
    except (DownloadFileException, OSError, ValueError) as error:
        raise UserError(
            f"ocr models for language {language!r} and det_size {det_size!r} cannot be opened "
            f"(rapidocr carries small ones for Chinese, Japanese and Latin letters): {error}"
        ) from error
    return reader


def _on_cuda() -> dict[str, Any]:
    """On this process's own GPU: onnxruntime itself would take the first one."""
    require_gpus_allowed(os.environ, "ocr engine 'cuda'")
    import onnxruntime  # rapidocr itself would read on the CPU instead, with a warning

    from duet.rewards.clip import own_gpu  # torch: only for a GPU

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise UserError(
            f"ocr engine 'cuda': onnxruntime has {', '.join(providers)}: "
            "pip install onnxruntime-gpu in place of onnxruntime, or use engine 'cpu'"
        )
    name = "EngineConfig.onnxruntime"
    return {f"{name}.use_cuda": True, f"{name}.cuda_ep_cfg.device_id": own_gpu()}


def _recogniser(language: str) -> dict[str, Any]:
    """PP-OCRv6 reads many languages with one model; PP-OCRv5 has one for each of some others."""
    from rapidocr.utils.model_resolver import list_supported_langs
    from rapidocr.utils.typings import ModelType, OCRVersion, TaskType

    many = list_supported_langs(TaskType.REC, OCRVersion.PPOCRV6, ModelType.SMALL)
    single = list_supported_langs(TaskType.REC, OCRVersion.PPOCRV5, ModelType.MOBILE)
    if language in many:
        return {"Rec.lang_type": language}
    if language in single:
        version, size = OCRVersion.PPOCRV5, ModelType.MOBILE
        return {"Rec.lang_type": language, "Rec.ocr_version": version, "Rec.model_type": size}
    allowed = ", ".join(sorted({*many, *single}))
    raise UserError(f"ocr language {language!r}: allowed are {allowed}")


def _word() -> np.ndarray:
    picture = Image.new("RGB", (192, 96), "white")
    font = ImageFont.load_default(48)
    ImageDraw.Draw(picture).text((96, 48), "WORD", "black", font=font, anchor="mm")
    return np.asarray(picture)[..., ::-1]

"""What a checkpoint says without its weights: its tokenizers, its limits, its defaults."""

from dataclasses import dataclass

from diffusers import AutoencoderKL
from transformers import ByT5Tokenizer, GenerationConfig, GlmImageConfig, GlmImageProcessor

from duet.configs.errors import UserError, first_line
from duet.inference.model import model_folder

# what `generate` of transformers takes where a checkpoint's generation config says nothing
STOCK_GENERATION = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class Outline:
    processor: GlmImageProcessor  # what the AR reads a prompt with
    tokenizer: ByT5Tokenizer  # the glyph encoder's
    positions: int  # that the AR knows: tokens of a prompt and of its pictures
    defaults: dict[str, float]  # the sampling settings that stock generation takes; pixels


def read_outline(path: str) -> Outline:
    """Of a local folder or a hub id: seconds before minutes of reading weights.

    The default size is the VAE's `sample_size` where that is a [height, width] pair, else the
    processor's. The pipeline's 50 steps and guidance scale 1.5 are the schema's own.
    Raises UserError when there is no such model.
    """
    folder = model_folder(path)
    ar = folder / "vision_language_encoder"
    try:
        processor = GlmImageProcessor.from_pretrained(str(folder / "processor"))
        tokenizer = ByT5Tokenizer.from_pretrained(str(folder / "tokenizer"))
        config = GlmImageConfig.from_pretrained(str(ar))
        vae = AutoencoderKL.load_config(str(folder / "vae"))
        # without that file the model has none either, and transformers makes it of the config
        written = (ar / "generation_config.json").is_file()
        generation = (
            GenerationConfig.from_pretrained(str(ar))
            if written
            else GenerationConfig.from_model_config(config)
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model.path = {path!r}: cannot be loaded: {first_line(error)}") from error
    size = vae.get("sample_size")
    if not isinstance(size, list | tuple):
        size = processor.target_h, processor.target_w
    named = {name: getattr(generation, name) for name in STOCK_GENERATION}
    named = {name: value for name, value in named.items() if value is not None}
    return Outline(
        processor,
        tokenizer,
        config.text_config.max_position_embeddings,
        {"height": size[0], "width": size[1]} | STOCK_GENERATION | named,
    )

"""The parts of the tiny GLM-Image with fresh weights: the real classes, small numbers.

Token ids of the AR: 0..383 codebook, 384 image start (also `bos`), 385 image
end, text from 392 on (codebook and text ids share one embedding table).
"""

import json
import random
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import Module
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from duet.train.tiny.edits import KINDS, sample_edit
from duet.train.tiny.world import HEIGHT_PIXELS, WIDTH_PIXELS, sample_card

CODEBOOK_SIZE = 384
IMAGE_START, IMAGE_END, VISION_VOCABULARY = 384, 385, 392
_SPECIAL = {
    "pad_token": "<|pad|>",
    "image_token": "<|image|>",
    "grid_bos_token": "<|grid_begin|>",
    "grid_eos_token": "<|grid_end|>",
}
_ROLES = ["<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_start|><|image|><|image_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}<|assistant|>"
)


def build_pipeline() -> GlmImagePipeline:
    """All seven parts with fresh weights, as the stock pipeline holds them."""
    tokenizer = build_tokenizer()
    # bounds in pixels: sides become multiples of 32 (two 16-pixel patches)
    image_processor = GlmImageImageProcessor(
        patch_size=16,
        temporal_patch_size=1,
        merge_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
    )
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor(image_processor, tokenizer, chat_template=_CHAT_TEMPLATE),
        text_encoder=build_glyph_encoder(),
        vision_language_encoder=build_ar(tokenizer),
        vae=build_vae(),
        transformer=build_dit(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            time_shift_type="linear",
            base_shift=1.0,
            max_shift=1.5,
        ),
    )
    return pipeline


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on captions and edits, its ids behind the vision vocabulary."""
    rng = random.Random(0)
    captions = [sample_card(rng).prompt for _ in range(4000)]
    captions += [sample_edit(kind, rng).prompt for kind in KINDS for _ in range(1000)]
    # letters of the drawn word must stay single tokens: train without the quoted span
    captions = [c.split('"')[0] for c in captions]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=416,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    codes = [f"<|code_{i}|>" for i in range(CODEBOOK_SIZE)]
    codes += ["<|image_start|>", "<|image_end|>"]
    codes += [f"<|vision_{i}|>" for i in range(len(codes), VISION_VOCABULARY)]
    vocabulary = {token: i for i, token in enumerate(codes)}
    vocabulary |= {token: i + VISION_VOCABULARY for token, i in trained.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = bpe.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|image_start|>",
        eos_token="<|image_end|>",
        pad_token=_SPECIAL["pad_token"],
        padding_side="left",
        extra_special_tokens={k: v for k, v in _SPECIAL.items() if k != "pad_token"},
        model_max_length=4096,
    )
    fast.add_special_tokens({"additional_special_tokens": codes + _ROLES}, False)
    return fast


def build_ar(tokenizer: PreTrainedTokenizerFast) -> GlmImageForConditionalGeneration:
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                # of 16 frequencies the last six tell columns: behind 1000 they are so low that
                # the 19 columns of a preview look alike
                "rope_theta": 5.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [4, 6, 6],
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": IMAGE_END,
            "vision_vocab_size": VISION_VOCABULARY,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "image_size": 64,
            "patch_size": 16,
        },
        vq_config={"embed_dim": 64, "num_embeddings": CODEBOOK_SIZE, "latent_channels": 64},
        image_token_id=tokenizer.convert_tokens_to_ids(_SPECIAL["image_token"]),
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
    )
    model = GlmImageForConditionalGeneration(config)
    with torch.no_grad():
        visual = model.model.visual
        visual.embeddings.position_embedding.weight.zero_()  # a code must not tell its place
        # flat random filters see a patch's mean colour, not its strokes; VQ compares
        # directions only, so a bias lets brightness turn the vector
        projection = visual.patch_embed.proj
        projection.weight.copy_(0.005 * torch.randn(64, 3, 1, 1).expand(-1, -1, 16, 16))
        projection.bias.normal_(std=1.0)
    return model


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        sample_size=(HEIGHT_PIXELS, WIDTH_PIXELS),
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def build_glyph_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=64,
            d_kv=16,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    )


def build_dit() -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        text_embed_dim=64,
        time_embed_dim=64,
        condition_dim=16,
        prior_vq_quantizer_codebook_size=CODEBOOK_SIZE,
    )


def replace_weights(module: Module, folder: Path) -> None:
    """Save the part file by file, each whole for those who read the folder meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        module.save_pretrained(fresh)
        for file in Path(fresh).iterdir():
            file.replace(folder / file.name)


def size_mib(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20

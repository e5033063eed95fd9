"""Composites on disk: tiny random checkpoints with images, written by Transformers' own classes, and their processors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import tiny_tokenizer
from families import fill_zeros
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.2,
}
IMAGE = "<image>"
PROMPT = "and the cat"


def _tokenizer(**tokens: str) -> Any:
    """The tiny tokenizer with special tokens for images, by the names that a processor asks for."""
    tokenizer = tiny_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: tokenizer.special_tokens_map[name] for name in ("pad_token", "bos_token", "eos_token")},
        extra_special_tokens=tokens,
    )
    return tokenizer


def _gemma3(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>")
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    fields = {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config=TEXT | fields | text,
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _llava(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token=IMAGE)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"} | text,
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor


def _mistral3(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token=IMAGE)
    config = transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None} | text,
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return config, tokenizer  # PixtralProcessor wants torchvision


# The name of a composite -> its dense config and its processor, or tokenizer, of what its text_config has besides TEXT.
_MADE = {"Gemma3": _gemma3, "Llava": _llava, "Mistral3": _mistral3}


def write_composite(folder: Path, name: str, text: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """Writes a random dense composite whose layers all matter, and returns the model in eval mode."""
    config, processor = _MADE[name](text or {})
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    fill_zeros(model)
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return model


def image_inputs(folder: Path, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one image, by the folder's own processor where it can be made without torchvision."""
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    if name == "Mistral3":
        ids = transformers.AutoTokenizer.from_pretrained(folder)(IMAGE * 4 + PROMPT, return_tensors="pt")
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        return dict(ids) | {"pixel_values": values, "image_sizes": torch.tensor([[28, 28]])}
    text = ("<boi>" if name == "Gemma3" else IMAGE) + PROMPT
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return dict(processor(images=[Image.fromarray(pixels)], text=text, return_tensors="pt"))

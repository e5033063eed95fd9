"""Composites on disk: tiny random checkpoints that read images, by Transformers' own classes, with their processors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import tiny_tokenizer
from families import FAMILIES, fill_zeros
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


def _qwen3_5(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token=IMAGE)
    config = transformers.Qwen3_5Config(
        text_config=TEXT | FAMILIES["Qwen3_5Text"] | {"layer_types": ["linear_attention", "full_attention"]} | text,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return config, tokenizer


# Layer 0 slides, layer 2 reads the keys and values of layer 1 and is twice as wide.
_GEMMA4 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 16,
    "final_logit_softcapping": 5.0,
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "use_bidirectional_attention": "vision",
}


def _gemma4(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token=IMAGE)
    config = transformers.Gemma4Config(
        text_config=TEXT | _GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320} | text,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 8,
            "use_clipped_linears": True,
        },
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "conv_kernel_size": 3,
            "output_proj_dims": 16,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=310,
        audio_token_id=311,
    )
    return config, tokenizer


def _gemma4_unified(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token=IMAGE)
    config = transformers.Gemma4UnifiedConfig(
        text_config=TEXT | _GEMMA4 | {"num_global_key_value_heads": 1, "attention_k_eq_v": True} | text,
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 8,
            "output_proj_dims": 32,
        },
        audio_config={"audio_embed_dim": 16},
        image_token_id=tokenizer.image_token_id,
        video_token_id=310,
        audio_token_id=311,
    )
    return config, tokenizer


# The name of a composite -> its dense config and its processor, of what its text_config has besides TEXT. Where the
# processor wants torchvision it is the tokenizer alone.
_MADE = {
    "Gemma3": _gemma3,
    "Llava": _llava,
    "Mistral3": _mistral3,
    "Qwen3_5": _qwen3_5,
    "Gemma4": _gemma4,
    "Gemma4Unified": _gemma4_unified,
}
COMPOSITES = list(_MADE)


def llava_like(config_class: str, **text: Any) -> Any:
    """The config of a composite of another kind around a decoder."""
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
    return getattr(transformers, config_class)(text_config=TEXT | text, vision_config=vision, image_token_index=300)


def write_composite(
    folder: Path, name: str, text: dict[str, Any] | None = None, config: Any = None, **options: Any
) -> PreTrainedModel:
    """Writes a random dense composite whose layers all matter, and returns the model in eval mode.

    text: what its text_config has besides TEXT. config: of another composite than the named ones.
    """
    made, processor = _MADE[name](text or {})
    config = config or made
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    fill_zeros(model)
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    if name == "Qwen3_5":  # as its own class writes it
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return model


def image_inputs(folder: Path, name: str, prompts: tuple[str, ...] = (PROMPT,)) -> dict[str, torch.Tensor]:
    """Prompts that begin with one image each, padded on the left; by the folder's own processor where there is one."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(prompts), 28, 28, 3), dtype=np.uint8)
    if name in ("Gemma3", "Llava"):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        texts = [("<boi>" if name == "Gemma3" else IMAGE) + prompt for prompt in prompts]
        images = [[Image.fromarray(image)] for image in pixels]
        made = dict(processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left"))
        made.pop("mm_token_type_ids", None)
        return made
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [IMAGE * 4 + prompt for prompt in prompts]  # each image is four tokens
    made = dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))
    made.pop("token_type_ids", None)
    is_image = (made["input_ids"] == tokenizer.image_token_id).long()
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).contiguous()
    grid = torch.tensor([[x, y] for y in range(4) for x in range(4)]).repeat(len(prompts), 1, 1)
    if name == "Mistral3":
        return made | {"pixel_values": images, "image_sizes": torch.tensor([[28, 28]] * len(prompts))}
    made["mm_token_type_ids"] = is_image
    patches = images[..., :16, :16].unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 4, 4, 4, 4]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, 16, 48]
    if name == "Qwen3_5":  # of two frames
        grid = torch.tensor([[1, 4, 4]] * len(prompts))
        return made | {"pixel_values": patches.repeat(1, 1, 2).flatten(0, 1), "image_grid_thw": grid}
    if name == "Gemma4Unified":  # whole squares of pixels
        wide = images[..., :16, :16].unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return made | {"pixel_values": wide, "image_position_ids": grid[:, [0, 1, 4, 5]].contiguous()}
    return made | {"pixel_values": patches, "image_position_ids": grid}

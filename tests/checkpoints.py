"""Dense checkpoints on disk for the conversion and fine-tuning tests: tiny, random, with a tokenizer of their own."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from families import fill_zeros, tiny_fields
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Real checkpoints and text; the folder beside the repository unless the variable says otherwise.
DATA = Path(os.environ.get("ECMOE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES_MODEL = DATA / "stories260K" / "hf"
STORIES_TEXT = DATA / "tinystories-v2-2MiB" / "tinystories_sample.txt"

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_text(path: Path, documents: int = 40) -> Path:
    """Real English of a few hundred kilobytes at most, one topic per document."""
    chosen = [topics[name].strip() for name in sorted(topics, key=lambda name: len(topics[name]))[-documents:]]
    path.write_text("\n<|endoftext|>\n".join(chosen), encoding="utf-8")
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["booleans"]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_dense(
    folder: Path, family: str, max_shard_size: str = "5GB", seed: int = 0, **fields: object
) -> PreTrainedModel:
    """Writes a random dense checkpoint whose layers all matter, and returns the model in eval mode."""
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 300,
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
        | tiny_fields(family, fields)
        | fields
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fill_zeros(model)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its subfolders, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, of one shard or many."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}

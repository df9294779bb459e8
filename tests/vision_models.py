"""Tiny multimodal models with random weights, made with tokenizer and processor in a folder, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] | upper }}:\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_QWEN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def tokenizer(special: Sequence[str], **arguments: Any) -> Any:
    """Return a byte-level tokenizer of a few hundred tokens, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["what colour is the square? it is red\n\n\n, green\n\n or blue\n\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **arguments)


def _saved(folder: Path, model: Any, tokenizer: Any, processor: Any, template: str) -> None:
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)


def qwen(folder: Path, kind: str = "qwen2_vl") -> None:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    made = tokenizer(_QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        **_TEXT,
        "vocab_size": len(made),
        "rope_parameters": rope,
        "head_dim": 8,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    ids = {
        f"{each}_token_id": made.convert_tokens_to_ids(token)
        for each, token in zip(("vision_start", "vision_end", "image", "video"), _QWEN[3:], strict=True)
    }
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    _saved(folder, model, made, images, CHATML)


def llava(folder: Path) -> None:
    """LLaVA 1.5."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    made = tokenizer(["<pad>", "<s>", "</s>", "<image>"], eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    text = {**_TEXT, "model_type": "llama", "vocab_size": len(made)}
    tower = {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=3, image_seq_length=16)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, made, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    _saved(folder, LlavaForConditionalGeneration(config), made, processor, PARTS_ONLY)


def gemma3(folder: Path) -> None:
    """Gemma 3."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(0)
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    made = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *special.values()],
        eos_token="<end_of_turn>", bos_token="<bos>", pad_token="<pad>", extra_special_tokens=special,
    )  # fmt: skip
    text = {**_TEXT, "vocab_size": len(made), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    config = Gemma3Config(
        text_config=text, vision_config=_TOWER, mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6,
        image_token_index=7,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(images, made, image_seq_length=4)
    _saved(folder, Gemma3ForConditionalGeneration(config), made, processor, GEMMA)


def idefics3(folder: Path) -> None:
    """Idefics 3, which cuts large images into tiles."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(0)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = [
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        "<global-img>",
        *tiles,
    ]
    made = tokenizer(special, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    text = {**_TEXT, "model_type": "llama", "vocab_size": len(made), "pad_token_id": 0}
    config = Idefics3Config(text_config=text, vision_config=_TOWER, scale_factor=2, image_token_id=3, pad_token_id=0)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, made, image_seq_len=4)
    _saved(folder, Idefics3ForConditionalGeneration(config), made, processor, PARTS_ONLY)


def qwen2_audio(folder: Path) -> None:
    """Qwen2-Audio."""
    import torch
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    torch.manual_seed(0)
    made = tokenizer(
        [*_QWEN, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    text = {**_TEXT, "model_type": "qwen2", "vocab_size": len(made)}
    tower = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 50,
    }  # fmt: skip
    config = Qwen2AudioConfig(text_config=text, audio_config=tower, audio_token_index=7)
    sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=16000)
    processor = Qwen2AudioProcessor(feature_extractor=sounds, tokenizer=made)
    _saved(folder, Qwen2AudioForConditionalGeneration(config), made, processor, CHATML)


IMAGES = {
    "qwen2_vl": qwen,
    "qwen2_5_vl": lambda folder: qwen(folder, "qwen2_5_vl"),
    "qwen3_vl": lambda folder: qwen(folder, "qwen3_vl"),
    "llava": llava,
    "gemma3": gemma3,
    "idefics3": idefics3,
}
"""What makes a model of each family that takes images."""

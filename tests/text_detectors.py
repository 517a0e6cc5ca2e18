"""Zero-shot detectors of the real classes, tiny and with random weights: made here, without a model hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch

GRID = 6  # cells of OWLv2's side; each proposes one box


def write_owlv2(folder: Path) -> Path:
    """An OWLv2 whose boxes are the cells of a grid of GRID x GRID: those of its bias, since its head gives zero."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    folder.mkdir(parents=True)
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{one}</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, "eos_token_id": len(tokens) - 1}
    vision = {"image_size": 16 * GRID, "patch_size": 16}
    torch.manual_seed(0)
    network = Owlv2ForObjectDetection(
        Owlv2Config(text_config=layer | text, vision_config=layer | vision, projection_dim=16)
    )
    torch.nn.init.zeros_(network.box_head.dense2.weight)
    torch.nn.init.zeros_(network.box_head.dense2.bias)
    images = Owlv2ImageProcessor(size={"height": 16 * GRID, "width": 16 * GRID})
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    network.save_pretrained(folder)
    return folder


def write_grounding_dino(folder: Path) -> Path:
    """A Grounding DINO with random weights."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "sofa", "red"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    network = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, image_size=64,
                out_features=["stage2", "stage3", "stage4"],
            ),
            text_config=BertConfig(
                vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=64,
            ),
            num_queries=12, encoder_layers=2, decoder_layers=2, max_text_len=16, **widths, **heads,
        )
    )  # fmt: skip
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    network.save_pretrained(folder)
    return folder

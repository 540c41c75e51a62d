"""Shapes of LLaVA models without weights, to try out what a cluster can hold.

Decoder of LLaVA-1.5, tower CLIP ViT-L/14 at 336 pixels.
"""

SHAPES = {
    "llava-1.5-7b": {"vocab_size": 32064},
    "llava-1.5-13b": {
        "vocab_size": 32064,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}

"""What a run can be exported to."""

FORMATS = ("open_clip", "hf", "peft")
TYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what weights are rounded to, and torch's name

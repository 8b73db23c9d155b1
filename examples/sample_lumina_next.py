"""From Lumina-Next in diffusers' format to a picture.

python examples/sample_lumina_next.py Alpha-VLLM/Lumina-Next-SFT-diffusers "孤舟蓑笠翁 🎣"
"""

import sys

import torch

from nextdit_core import Pipeline

folder, prompt = sys.argv[1:]
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
pipe = Pipeline.from_pretrained(folder, dtype=dtype)
(picture,) = pipe(prompt, nfe=20, schedule="shift:4", guidance=4.0, seed=7)
picture.save("lumina.png")
print(f"{picture.width} x {picture.height} pixels in lumina.png")

"""Sample a Stable Diffusion 3 pipeline of diffusers with a solver of flowsolvers; runs offline."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as Pipeline

from flowsolvers.adapters.diffusers import FlowScheduler

# Tiny random weights, and embeddings for a prompt; yours: Pipeline.from_pretrained(...)
sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 8}
widths = {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
transformer = SD3Transformer2DModel(**sizes, **widths)
vae = AutoencoderKL(latent_channels=16, norm_num_groups=1, block_out_channels=(4,), shift_factor=0)
pipe = Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *[None] * 6)
names = ("prompt_embeds", "negative_prompt_embeds")
prompt = {name: torch.randn(1, 4, 8) for name in names}
prompt |= {name.replace("prompt", "pooled_prompt"): torch.randn(1, 8) for name in names}

pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver="pec2")
image = pipe(**prompt, num_inference_steps=10, height=16, width=16).images[0]
image.save("sd3.png")
print(pipe.scheduler.plan)

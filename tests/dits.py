"""A small DiT with random weights, and its pipeline."""

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def dit(layers=2):
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": layers}
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8}
    return DiTTransformer2DModel(**options, **sizes).eval()


def pipeline(transformer):
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = DiTPipeline(transformer=transformer, vae=vae.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe

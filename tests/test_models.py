"""
The laws that all three models obey, so that train.py needs to know none of them: a plan for the whole batch, sums over
slices, counts of the whole. And a short run of each: stopped and resumed, and by two processes.
"""

import dataclasses
import functools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_train import SHAPES, assert_bitwise, assert_close, flags_of, in_process, losses_of, processes, stop_in_step

import data
import eval as evaluation
import train
from extras import runtime, weights
from extras.table import build
from extras.tokenizer import Tokenizer

# the scene is the same for all examples of a case
calm = [HealthCheck.function_scoped_fixture]
few = settings(deadline=None, max_examples=5, phases=[Phase.generate], suppress_health_check=calm)
SEEDS = st.integers(0, 2**31 - 1)

CASES = [  # (model, what is changed in its recipe, progress): every phase of every curriculum
    ("mvlt", {}, 0.0),
    ("mvlt", {}, 0.5),
    ("mvlt", {"objectives": "mir,itm,mlm,itc,distil", "hard_from": 0.4}, 0.5),
    ("mvlt", {"objectives": "mir,itm,mlm", "unmasked_itm": False, "mask_style": "stroke"}, 0.5),
    ("mvlt", {"objectives": "cr", "modality": "image", "mask_pictures": 0.0}, 0.5),
    ("mvlt", {"objectives": "cr", "modality": "text", "mask_pictures": 0.0}, 0.5),
    ("kaleido", {}, 0.0),
    ("kaleido", {}, 0.5),
    ("kaleido", {"unmasked_itm": False, "align": "told", "objectives": "sat,mlm:2,itm,cp"}, 0.5),
    ("kaleido", {"objectives": "caption"}, 0.5),
    ("vlmo", {}, 0.0),
    ("vlmo", {}, 0.15),
    ("vlmo", {}, 0.25),
    ("vlmo", {}, 0.9),
    ("vlmo", {"objectives": "itm,cr", "hard": 0.0}, 0.9),
]
NAMES = [f"{model} {'own ' * (not changes)}{changes.get('objectives', '')} at {at}" for model, changes, at in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


@dataclasses.dataclass
class Scene:
    """A model without dropout, and what it reads at this progress."""

    model: torch.nn.Module
    split: data.Split
    progress: float

    @property
    def weight(self):
        return self.model.recipe.weights

    def batch(self, G, step, seed):
        """The whole batch, with augmentation."""
        order = ["pool"] * (step + 1)
        batches = data.Batches({"pool": self.split}, order, G, seed, step, step + 1, mirror=0.5, shift=1, zoom=0.2)
        return next(iter(batches))


@functools.lru_cache(maxsize=None)
def open_shop(shop):
    """The training and the validation split, and their unpaired pools."""
    rows = data.read(shop, "train")
    labels = {field: build(rows).class_names(field) for field in ("category", "subcategory")}
    tokenizer = Tokenizer.train([row["caption"] for row in rows], 80)
    train_split, val = (data.open_split(shop, name, tokenizer, labels, 32, 16) for name in ("train", "val"))
    pools = {"pairs": train_split, "val": val}
    return pools | {"pictures": data.picture_pool(train_split), "captions": data.caption_pool(train_split)}


def make_model(name, changes, split):
    torch.manual_seed(0)
    file, labels = weights.FILES[name], split.labels
    sizes = dict(vocab_size=len(split.tokenizer), dropout=0.0)
    sizes |= dict(n_category=len(labels["category"]), n_subcategory=len(labels["subcategory"]))
    still = {"drop_path": 0.0} if hasattr(file.Config, "drop_path") else {}
    model = weights.MODELS[name](file.Config(**SHAPES[name], **sizes, **still), file.Recipe(**changes))
    model.vocabulary, model.labels, model.bf16 = split.tokenizer.words, labels, False
    if hasattr(model, "prepare"):
        model.prepare(split)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, so that nothing is small by its initialisation
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def scene(shop, case):
    name, changes, progress = case
    pools = open_shop(shop)
    model = make_model(name, changes, pools["pairs"])
    return Scene(model, pools[model.reads(progress)], progress)


@pytest.fixture
def exact_scene(scene, monkeypatch):
    """The scene in float64, weights and pictures."""
    usual = data.to_floats
    monkeypatch.setattr(data, "to_floats", lambda pixels, device="cpu": usual(pixels, device).double())
    scene.model.double()
    return scene


def draws(*key):
    return functools.partial(data.generator, *key)


def teach(rows):
    """Teachers that find similarities between -5 and 5."""
    return 5 * torch.cos(rows[:, None] * 7.0 + rows * 3.0)


def in_one_piece(scene, rows, images, draw, images_at, teachers=None):
    """
    The reference: all pairs read at once, and no gradients by hand. Returns {objective: (sum, count)}, the sums with
    their graph. images_at(places) are the pictures of some places of the batch.
    """
    model, split, vectors, found = scene.model, scene.split, None, {}
    if "itc" in model.active(scene.progress):
        tokens = data.trim(split.tokens[rows])
        vectors = model.embed(images, tokens)
        taught = teachers(rows) if teachers else None
        found["itc"] = model.contrast(vectors, split.same(rows), taught) * len(rows), len(rows)
        vectors = vectors.detach()
    plan, count = model.plan(split, rows, draw, vectors, scene.progress)
    if "other" in plan:
        plan["other_images"] = images_at(plan["other"].clamp(min=0))
    sums = model.losses(images, plan) if count else {}
    for name, number in count.items():
        found[name] = sums.get(name, torch.zeros(())), number
    return found


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def cut(batch, lo, hi):
    """One process's share of a whole batch."""
    pixels = None if batch.pixels is None else batch.pixels[lo:hi]
    return dataclasses.replace(batch, share=(lo, hi), pixels=pixels)


def by_processes(scene, batch, seed, slices, micro_batch, teachers=None):
    """The losses and gradients of train.step_gradients, summed over simulated processes."""
    model, vectors, losses = scene.model, None, {}
    if "itc" in model.active(scene.progress):
        with torch.no_grad():
            vectors = model.embed(batch.images(slice(0, len(batch.rows))), data.trim(scene.split.tokens[batch.rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "world", lambda: len(slices))
        if len(slices) > 1:
            patch.setattr(train, "gather", lambda own, place, G: vectors.clone())
        for lo, hi in slices:
            part = cut(batch, lo, hi)
            shares = train.step_gradients(model, part, seed, micro_batch, scene.progress, teachers)
            for name, share in shares.items():
                losses[name] = losses.get(name, 0) + float(share)
    return losses, gradients(model)


@st.composite
def partitions(draw):
    """A batch size, the slices of its processes, and the micro-batch."""
    G = draw(st.integers(2, 9))
    cuts = sorted(draw(st.sets(st.integers(1, G - 1), max_size=3)))
    return G, list(zip([0, *cuts], [*cuts, G])), draw(st.integers(0, 4))


@every_case
@few
@given(partition=partitions(), seed=SEEDS, step=st.integers(0, 20), teachers=st.sampled_from([None, teach]))
def test_any_partition_of_a_batch_gives_the_losses_and_gradients_of_the_whole(
    exact_scene, partition, seed, step, teachers
):
    G, slices, micro_batch = partition
    scene = exact_scene
    model, batch = scene.model, scene.batch(G, step, seed)
    train.freeze_all_but(model, model.trained(scene.progress))
    pixels = batch.images(slice(0, G))
    found = in_one_piece(scene, batch.rows, pixels, draws(seed, step), batch.images_at, teachers)
    means = {name: total / max(1, count) for name, (total, count) in found.items()}
    total = sum(scene.weight[name] * mean for name, mean in means.items())
    if total.requires_grad:  # where a batch holds nothing to count there is no gradient
        total.backward()
    right = gradients(model)

    losses, ours = by_processes(scene, batch, seed, slices, micro_batch, teachers)
    for name, mean in means.items():
        assert losses.get(name, 0) == pytest.approx(mean.item(), rel=1e-5, abs=1e-7), name
    for name in ours.keys() | right.keys():
        a, b = (grads.get(name, torch.zeros(())) for grads in (ours, right))
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max()), name


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mvlt", {"objectives": "itc"}),
        ("vlmo", {"objectives": "itc", "image_until": 0.0, "text_until": 0.0}),
    ],
)
@few
@given(G=st.integers(2, 9), seed=SEEDS, micro_batch=st.integers(1, 4))
def test_the_towers_second_forward_pass_drops_what_the_first_dropped(shop, name, changes, G, seed, micro_batch):
    """So the gradient in two steps is that of one graph through the same passes, dropout included."""
    split = open_shop(shop)["pairs"]
    model = make_model(name, changes, split).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    scene = Scene(model, split, 0.9)
    batch = scene.batch(G, 3, seed)
    train.freeze_all_but(model, model.trained(0.9))
    tokens, vectors = data.trim(split.tokens[batch.rows]), []
    for part in batch.parts(micro_batch):
        train.reseed(seed, 3, part.start, "towers")
        vectors.append(model.embed(batch.images(part), tokens[part]))
    loss = model.contrast(torch.cat(vectors, dim=1), split.same(batch.rows))
    (model.recipe.weights["itc"] * loss).backward()
    right = gradients(model)

    losses, ours = by_processes(scene, batch, seed, [(0, G)], micro_batch)
    assert losses["itc"] == pytest.approx(loss.item(), rel=1e-5)
    assert ours.keys() == right.keys()
    for key, gradient in right.items():
        assert (ours[key] - gradient).abs().max() <= 1e-4 * (1 + gradient.abs().max()), key


@every_case
def test_what_trains_gets_a_gradient_and_nothing_else_does(scene):
    model, G = scene.model, len(scene.split)
    train.freeze_all_but(model, model.trained(scene.progress))
    reached = set()
    for step in range(3):
        _, found = by_processes(scene, scene.batch(G, step, 0), 0, [(0, G)], 0)
        reached |= {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert reached == model.trained(scene.progress)


@every_case
def test_no_two_draws_of_a_plan_share_a_key(scene):
    """With one key they would depend on each other: hidden pixels on hidden words, say."""
    asked, ends = [], 4 if scene.model.kind == "vlmo" else 2
    vectors = torch.nn.functional.normalize(torch.randn(ends, 8, 8), dim=-1)
    draw = lambda what: asked.append(what) or data.generator(0, what)
    scene.model.plan(scene.split, torch.arange(8), draw, vectors, scene.progress)
    assert len(set(asked)) == len(asked)


@every_case
@few
@given(G=st.integers(1, 12), seed=SEEDS, noise=SEEDS)
def test_a_plan_depends_on_its_key_alone_and_covers_the_whole_batch(scene, G, seed, noise):
    model = scene.model
    ends = 4 if model.kind == "vlmo" else 2
    vectors = torch.randn(ends, G, 8, generator=torch.Generator().manual_seed(seed))
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    rows = data.batch_rows(0, G, len(scene.split), seed)

    def plan(global_seed):
        for reseed in (torch.manual_seed, np.random.seed, random.seed):
            reseed(global_seed)
        before = torch.get_rng_state()
        result = model.plan(scene.split, rows, draws(seed, 3), vectors, scene.progress)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    (first, count), (again, other_count) = plan(1), plan(noise)
    assert first.keys() == again.keys() and count == other_count
    assert count.keys() == set(model.active(scene.progress)) - {"itc"} and bool(first) == bool(count)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and len(value) == G and value.device.type == "cpu", name
    if "other" in first:
        named = first["other"] >= 0
        assert (first["other"] < G).all() and not scene.split.same(rows)[named, first["other"][named]].any()


CHOICES = {"itm": 2, "rr": 4, "jps": 24, "cp": 9}  # objective -> the classes it chooses from; words: the vocabulary


@every_case
@few
@given(G=st.integers(2, 12), seed=SEEDS)
def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_choices_for_each_item_that_is_counted(scene, G, seed):
    """With all weights zero each of K answers is as likely, so that the mean is log K only if the count is right."""
    model, labels = scene.model, scene.split.labels
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = scene.batch(G, 0, seed)
    found = in_one_piece(scene, batch.rows, batch.images(slice(0, G)), draws(seed, 0), batch.images_at)
    choices = CHOICES | dict.fromkeys(("mlm", "textmlm", "sat", "caption"), len(scene.split.tokenizer))
    choices["cr"] = len(labels["category"]) * len(labels["subcategory"])
    for name, (total, count) in found.items():
        if name in choices and total > 0:
            assert total.item() / count == pytest.approx(math.log(choices[name]), rel=1e-5), name
        elif name in choices and name != "cr":  # recognition's shares may add up to nothing
            assert count == 0, name


@pytest.mark.parametrize("name", list(weights.FILES))
@settings(few, max_examples=20)
@given(G=st.integers(1, 7), seed=SEEDS)
def test_recognition_is_the_mean_over_known_main_categories_plus_that_over_known_sub_categories(shop, name, G, seed):
    split = open_shop(shop)["pairs"]
    known = {"categories": "category", "subcategories": "subcategory"}
    for field, names in known.items():  # -1: unknown
        classes = torch.randint(-1, len(split.labels[names]), (len(split),), generator=data.generator(seed, field))
        split = dataclasses.replace(split, **{field: classes})
    changes = {} if name == "vlmo" else {"drop_caption": 0.0}
    model = make_model(name, {"objectives": "cr", **changes}, split).eval()
    rows = torch.arange(G)
    images = split.images(rows)
    with torch.no_grad():
        total, _ = in_one_piece(Scene(model, split, 0.95), rows, images, draws(seed), split.images)["cr"]
        answers = model.classify(images, data.trim(split.tokens[rows]))
    expected = 0
    for logits, field in zip(answers, known):
        losses = [-one.log_softmax(0)[right].item() for one, right in zip(logits, getattr(split, field)) if right >= 0]
        expected += sum(losses) / max(1, len(losses))
    assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@every_case
@few
@given(batch_size=st.integers(3, 9), seed=SEEDS)
def test_validation_equals_the_losses_of_a_step_without_gradients(scene, shop, batch_size, seed):
    model, val = scene.model.train(), open_shop(shop)["val"]
    values = evaluation.validate(model, val, seed, scene.progress, batch_size)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())

    on_val, sums, counts = dataclasses.replace(scene, split=val), {}, {}
    for number, rows in enumerate(torch.arange(len(val)).tensor_split(-(-len(val) // batch_size))):
        images_at = lambda places: val.images(rows[places])
        draw = draws(seed, "validation", number)
        for name, (total, count) in in_one_piece(on_val, rows, val.images(rows), draw, images_at).items():
            sums[name] = sums.get(name, 0) + total.item()
            counts[name] = counts.get(name, 0) + count
    for name, count in counts.items():
        if count:
            assert values[name] == pytest.approx(sums[name] / count, rel=1e-5), name
    assert set(values) - {"tir_towers", "itr_towers", "cr_accuracy"} == {name for name in counts if counts[name]}


@pytest.mark.parametrize("name", list(weights.FILES))
def test_a_model_that_is_saved_and_loaded_scores_the_same(shop, tmp_path, name):
    split = open_shop(shop)["pairs"]
    model = make_model(name, {}, split).eval()
    weights.save(tmp_path / "model.pt", model, step=3)
    loaded = weights.load(tmp_path / "model.pt")
    assert (loaded.kind, loaded.config, loaded.recipe) == (name, model.config, model.recipe)
    assert (loaded.vocabulary, loaded.labels, loaded.training) == (model.vocabulary, model.labels, False)
    rows = torch.arange(len(split))
    with torch.no_grad():
        assert torch.equal(*(one.score(split.images(rows), split.tokens[rows]) for one in (model, loaded)))
    for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, theirs), key


# --- Short runs ---

RUN = {  # the end of each stage falls into the six steps
    "mvlt": "--itm-from 0.5 --hard-from 0.7",
    "kaleido": "--align-from 0.5",
    "vlmo": "--image-until 0.17 --text-until 0.34 --itm-from 0.5",
}
every_model = pytest.mark.parametrize("name", list(weights.FILES))


@every_model
def test_muon_trains_the_hidden_matrices_and_adamw_all_else(shop, name):
    model = make_model(name, {}, open_shop(shop)["pairs"])
    layers = dict(model.named_modules())
    for end in model.ends:
        assert any(end in f"{layer}." for layer in layers), end  # none is misspelt
    for optimizer in ("muon", "adamw"):
        groups = train.make_optimizer(model, train.Settings(model=name, optimizer=optimizer)).param_groups
        grouped = [parameter for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
        turned = {parameter for group in groups if group["orthogonal"] for parameter in group["params"]}
        hidden = set()
        for layer, module in layers.items():
            linear = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
            if linear and not any(end in f"{layer}." for end in model.ends):
                hidden.add(module.weight)
        assert turned == (hidden if optimizer == "muon" else set())


def run_of(name, shop, *more):
    common = """--steps 6 --batch-size 6 --lr 5e-4 --log-every 1 --save-every 4 --mirror 0.5 --shift 1 --zoom 0.2
        --average"""
    return ["--model", name, *flags_of(name), *RUN[name].split(), *common.split(), "--data", shop, *more]


@pytest.fixture(scope="module")
def unbroken(shop, tmp_path_factory):
    """name -> a run of six steps with dropout that nothing disturbed."""
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: in_process(folder / name, *run_of(name, shop)))


@every_model
def test_a_run_stopped_at_the_end_of_a_stage_or_within_it_ends_with_the_same_bits(unbroken, shop, tmp_path, name):
    for step in (0, 2, 3):
        run = stop_in_step(step, tmp_path / str(step), *run_of(name, shop))
        in_process(run, "--resume", "--device", "cpu")
        assert_bitwise(run, unbroken(name))
        assert losses_of(run) == losses_of(unbroken(name))


@pytest.mark.parametrize("name", ["kaleido", "vlmo"])  # MVLT: test_train.py
def test_two_processes_give_the_weights_of_one(shop, tmp_path, name):
    still = ["--dropout", 0, "--no-bf16"] + ["--drop-path", 0] * (name != "kaleido")
    one = in_process(tmp_path / "one", *run_of(name, shop, *still))
    two = processes(2, tmp_path / "two", *run_of(name, shop, *still))
    assert_close(two, one)
    for ours, theirs in zip(losses_of(two), losses_of(one), strict=True):
        for part in (ours, theirs):
            part |= part.pop("val", {})
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)

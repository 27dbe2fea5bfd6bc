"""
What Kaleido-BERT takes from others: ResNet-50 as its patch encoder, and the weights of ResNet-50, BERT and the authors.

BERT's checkpoint in PyTorch and the authors' in TensorFlow have the same parts under two spellings, which `spelling`
makes one: "bert/encoder/layer_0/attention/self/query/kernel" is "bert.encoder.layer.0.attention.self.query.weight". The
authors' file is read as an .npz of its variables, written once with TensorFlow:

    reader = tf.train.load_checkpoint(path)
    np.savez("kaleido.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from extras import foreign

# --- ResNet-50 (He et al. 2016), with the names of torchvision's checkpoints ---


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut."""

    def __init__(self, wide_in, narrow, stride):
        super().__init__()
        wide = 4 * narrow
        self.conv1, self.bn1 = nn.Conv2d(wide_in, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.downsample = None
        if wide_in != wide:
            self.downsample = nn.Sequential(nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 without its classifier: frozen, with the statistics of its checkpoint."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        wide_in = 64
        for number, blocks in enumerate((3, 4, 6, 3), start=1):
            layer = []
            for i in range(blocks):
                layer.append(Bottleneck(wide_in, 32 << number, stride=2 if i == 0 and number > 1 else 1))
                wide_in = 128 << number
            setattr(self, f"layer{number}", nn.Sequential(*layer))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # batch norm keeps its statistics

    def forward(self, patches):
        """(n, 3, p, p) in [0, 1] -> (n, 2048)"""
        mean = patches.new_tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's
        deviation = patches.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        x = F.relu(self.bn1(self.conv1((patches - mean) / deviation)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

    def target(self, patches):
        """What G2CM and B2CM regress, (n, 2048): softmax of the clean patch's features, as the paper."""
        return self(patches).float().softmax(dim=1)


def load_resnet50(model, checkpoint):
    """Put a ResNet-50 (a state dict or its file, torchvision's names) into the patch encoder. Returns the report."""
    weights = foreign.open_state_dict(checkpoint)
    where = model.config.encoder
    foreign.must(where == "resnet50", "encoder", "must be resnet50, to take the weights of a ResNet-50", where)
    names = {}
    for name in model.encoder.state_dict():
        if not name.endswith("num_batches_tracked"):
            names[f"encoder.{name}"] = name
    ignored = {
        r"fc\.(weight|bias)": "ignored: ImageNet's classifier",
        r".+\.num_batches_tracked": "ignored: counts training steps",
    }
    return foreign.adopt(model, weights, names, ignored)


# --- BERT and the authors' checkpoint ---

BERT = {  # our part -> BERT's
    "words.word.weight": "bert.embeddings.word_embeddings",
    "words.position": "bert.embeddings.position_embeddings",
    "words.segment": "bert.embeddings.token_type_embeddings",
    "words.norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "word_head.dense": "cls.predictions.transform.dense",
    "word_head.norm": "cls.predictions.transform.LayerNorm",
    "word_head.bias": "cls.predictions.bias",
}
BLOCK = {  # our part of block i -> BERT's of encoder.layer.i
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
OFFICIAL = {  # the rest of the authors' checkpoint; the misprints are theirs
    "place.weight": "bert.position_dense",
    "match_head": "cls.seq_relationship",
    "rotation_head.weight": "cls.img_rotation.rotation_output_weights",
    "rotation_head.bias": "cls.img_rotation.rotation_output_bias",
    "jigsaw_head.weight": "cls.img_jigsaw.jiasaw_output_weights",
    "jigsaw_head.bias": "cls.img_jigsaw.jigsaw_output_bias",
    "camouflage_head.weight": "cls.img_camouflage.camouflage_output_weights",
    "camouflage_head.bias": "cls.img_camouflage.camouflage_output_bias",
    "recolour_head.weight": "cls.img_greymask.greymask_output_weights",
    "repaint_head.weight": "cls.img_blankmask.blanmask_output_weights",
}
LEVELS = ("rotation", "jigsaw", "camouflage", "greymask", "blank")  # what they call the five levels
SAME = {"kernel": "weight", "gamma": "weight", "beta": "bias", "output_weights": "weight", "output_bias": "bias"}
TRANSPOSED = ("/kernel", "position_dense", "_projector", "greymask_output_weights", "blanmask_output_weights")
IGNORED_BERT = {
    r".*position_ids": "ignored: counts 0, 1, 2, ...",
    r".*seq_relationship.*": "ignored: next-sentence prediction is another task",
    r"cls\.predictions\.decoder\.(weight|bias)": "tied: the word embedding and the bias of cls.predictions",
}
IGNORED_OFFICIAL = {
    r".+/(adam_[mv]|Adam|Adam_1)": "ignored: the optimiser's",
    r"(.+/)?(global_step|beta[12]_power)": "ignored: the optimiser's",
}


def spelling(name):
    """One name for both spellings: PyTorch's, without what stands before bert. or cls., and tables without .weight."""
    name = name.replace("/", ".")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    found = re.search(r"(^|\.)((bert|cls)\..+)", name)
    name = re.sub(r"\.layer_(\d+)\.", r".layer.\1.", found[2] if found else name)
    part, _, last = name.rpartition(".")
    name = f"{part}.{SAME.get(last, last)}"
    return name.removesuffix(".weight") if name.endswith("embeddings.weight") else name


def their_parts(depth, official):
    """{our part: their part} of a model with that many blocks."""
    parts = dict(BERT)
    for i in range(depth):
        for ours, theirs in BLOCK.items():
            parts[f"blocks.{i}.{ours}"] = f"bert.encoder.layer.{i}.{theirs}"
    if official:
        parts |= OFFICIAL
        for i, name in enumerate(LEVELS):
            table = f"bert.{name}_embeddings.{'blankmask' if name == 'blank' else name}"
            parts[f"levels.{i}.project.weight"] = f"{table}_projector"
            parts[f"levels.{i}.segment"] = f"{table}_type_embeddings"
            parts[f"levels.{i}.norm"] = f"{table}EmbLayerNorm"
    return parts


def their_names(model, weights, official=False):
    """{our parameter: their key}; where they have none, their spelling of it, which `adopt` then reports as missing."""
    keys = {spelling(key): key for key in weights}
    names = {}
    for ours, _ in model.named_parameters():
        for part, theirs in their_parts(model.config.depth, official).items():
            if f"{ours}.".startswith(f"{part}."):
                theirs += ours[len(part) :]
                names[ours] = keys.get(theirs, theirs)
    return names


def fit(theirs, value, ours, shape):
    """Their tensor in our shape: TensorFlow's kernels are transposed, of tables the rows that are read are taken."""
    foreign.must(value.ndim in (1, 2) and len(value), theirs, "must be a vector or a table", tuple(value.shape))
    if theirs.endswith(TRANSPOSED):
        return value.T, "used, transposed"
    if ours == "words.position":
        rows = f"the first {shape[0]} of {len(value)} rows"
        return value[: shape[0]], "used" if len(value) <= shape[0] else f"used: {rows}"
    if ours == "words.segment":
        return value[0], "used: segment 0"
    if ours.endswith(".segment"):  # level k is row k of their table, which by default has two rows: others read zeros
        k = int(ours.split(".")[1]) + 1
        row = value[k] if k < len(value) else torch.zeros_like(value[0])
        return row, f"used: row {k}" if k < len(value) else f"used: zeros, for want of a row {k}"
    return value, "used"


def load_bert(model, checkpoint):
    """
    Put BERT (a state dict, its PyTorch file, or an .npz of its TensorFlow variables) into the words, the blocks, the
    pooler and the word head; what reads patches stays as it is. Returns {their key: what became of it}.
    """
    weights = foreign.open_arrays(checkpoint)
    report = foreign.adopt(model, weights, their_names(model, weights), IGNORED_BERT, fit)
    decoder = weights.get("cls.predictions.decoder.weight", model.words.word.weight)
    tied = torch.equal(decoder.to(model.words.word.weight), model.words.word.weight)
    foreign.must(tied, "cls.predictions.decoder.weight", "must equal the word embedding", "another tensor")
    return report


def load_parts(model, checkpoint):
    """Put BERT's weights, ResNet-50's, or those of both in one dict into a Kaleido. Returns the report."""
    weights, report = foreign.open_arrays(checkpoint), {}
    resnet = {key: value for key, value in weights.items() if re.match(r"(conv1|bn1|layer[1-4]|fc)\.", key)}
    bert = {key: value for key, value in weights.items() if key not in resnet}
    if resnet:
        report |= load_resnet50(model, resnet)
    if bert:
        report |= load_bert(model, bert)
    return report


def load_official(model, weights):
    """Put the authors' weights ({name: tensor}) into a Kaleido. Returns {their key: what became of it}."""
    return foreign.adopt(model, weights, their_names(model, weights, official=True), IGNORED_OFFICIAL, fit)


def official_shape(weights):
    """The fields of kaleido.Config that the authors' weights decide."""
    shapes = {spelling(key): tuple(value.shape) for key, value in weights.items()}
    words, layer = "bert.embeddings.word_embeddings", "bert.encoder.layer.{}.intermediate.dense.bias"
    found = len(shapes.get(words, ())) == 2 and layer.format(0) in shapes
    foreign.must(found, "checkpoint", f"must hold {words} and encoder layers", sorted(weights)[:3])
    vocab_size, width = shapes[words]
    depth = sum(layer.format(i) in shapes for i in range(len(shapes)))
    mlp_ratio = shapes[layer.format(0)][0] // width
    return dict(vocab_size=vocab_size, width=width, depth=depth, mlp_ratio=mlp_ratio, heads=max(1, width // 64))

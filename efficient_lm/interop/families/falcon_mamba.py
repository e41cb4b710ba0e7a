"""FalconMamba (Zuo et al. 2024): Mamba with a norm, without a scale, of Δ, B and C before they are used."""

from efficient_lm.interop.description import norm
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.mamba import MODEL, RMS, TENSORS, keys, selective
from efficient_lm.interop.keys import key

FAMILY = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    model=MODEL,
    block={"ffn": None, "norm": RMS},
    kinds={"layer": {"mixer": {"kind": "mamba", "inner_norm": {"kind": "rmsnorm", "scale": False}}}},
    keys=(*keys(), key("mixer_rms_eps", "block.mixer.inner_norm.epsilon", default=1e-6)),
    tensors=TENSORS,
    layer_tensors=(*norm("norm", "mixer.input_norm"), *selective("mixer")),
    layer="backbone.layers.{}.",
    prefix="backbone.",
    dropouts=(),
    ignored=(),
)

"""The parts of tiny-wan, untrained: every one a stock class of diffusers or transformers, only small."""

from typing import Any, cast

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .. import shapes
from .config import TeacherConfig

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the small world's grammar; case and punctuation are dropped."""
    words = (PAD, END, UNKNOWN, *shapes.VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def build_text_encoder(config: TeacherConfig, vocabulary: int) -> UMT5EncoderModel:
    """A UMT5 encoder of a few layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=config.text_width,
            d_kv=32,
            d_ff=2 * config.text_width,
            num_layers=config.text_layers,
            num_heads=config.text_width // 32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_vae(config: TeacherConfig) -> AutoencoderKLWan:
    """Wan's causal autoencoder, which halves time and quarters both sides."""
    return AutoencoderKLWan(
        base_dim=config.vae_width,
        z_dim=config.latent_channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def build_transformer(config: TeacherConfig) -> WanTransformer3DModel:
    """Wan2.1's transformer, text to video, with fewer and narrower blocks."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_width,
        freq_dim=128,
        ffn_dim=config.ffn,
        num_layers=config.blocks,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


def build_scheduler(config: TeacherConfig) -> UniPCMultistepScheduler:
    """Wan's sampler, with the shift that the teacher is trained with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=config.shift
    )


def build_pipeline(
    config: TeacherConfig,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> WanPipeline:
    """The parts as a stock pipeline."""
    # WanPipeline names narrower classes for these two than it takes, and than its own checkpoints hold.
    tokenizer, scheduler = cast(Any, build_tokenizer()), cast(Any, build_scheduler(config))
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )

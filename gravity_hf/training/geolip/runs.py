"""From settings to a trained geolip with its verdict: of a host's features, or of images.

result = train_images(ImageSettings(out="shapes", images="shapes", steps=400))
result.verdict.mechanism
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed

from ...models.geolip.companion_hosts import is_causal_host, width_of
from ...models.geolip.configuration_companion import GeolipCompanionConfig
from ...models.geolip.configuration_geolip import GeolipConfig
from ...models.geolip.feature_statistics import feature_statistics
from ...models.geolip.image_processing_geolip import GeolipImageProcessor
from ...models.geolip.places import lasting_name
from .feature_data import split_windows, stored_features, weights_digest, windows_of
from .folder import claimed, require_same_data
from .image_data import load_images
from .records import name_of_source
from .settings import FeatureSettings, ImageSettings
from .texts import Texts, load_texts, texts_of
from .training import Companion, GeolipResult, TrainingData, train

__all__ = ["GeolipResult", "train_features", "train_images"]

_FEATURES_FOLDER = "features"


def train_features(
    settings: FeatureSettings,
    *,
    host: PreTrainedModel | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GeolipResult:
    """Train a geolip of what a host makes of texts; a tenth of the texts is measured on.

    On the CPU equal settings give equal models, bit for bit, also where a run was stopped and goes
    on. Features are normalised by the statistics of the texts that are trained on.

    Args:
        settings: what, and for how long.
        host: in the place of `settings.host`; with `companion` it needs a name or folder.
        tokenizer: of the host. None: of the same name.
        texts: in the place of the settings' files and data set.
        callbacks: further ones of transformers.

    Raises:
        ValueError: settings that do not fit, a folder that holds something else, no host.
        OSError: a host that cannot be loaded.
    """
    name = settings.host or (host.name_or_path if host is not None else "")
    if host is None and not name:
        raise ValueError(
            "host: expected a name or folder for AutoModel, or a model, got none. Give --host"
        )
    state = PartialState(cpu=settings.device == "cpu" or None)
    with claimed(settings, state) as work:
        found = _texts(settings, texts)
        host = _loaded(AutoModel, name) if host is None else host
        tokenizer = _loaded(AutoTokenizer, name) if tokenizer is None else tokenizer
        host = host.to("cpu" if settings.device == "cpu" else state.device)
        key = {"host": weights_digest(host), "type": host.config.model_type, "texts": found.digest}
        require_same_data(work, key, state)
        place = Path(settings.cache) if settings.cache else work / _FEATURES_FOLDER
        # The others find what the first has made.
        with state.main_process_first():
            windows = stored_features(
                place,
                host,
                tokenizer,
                found.paragraphs,
                key=key,
                layer=settings.layer,
                max_length=settings.max_length,
                batch_size=settings.host_batch,
                progress=settings.progress and state.is_main_process,
            )
        rows, held_out = split_windows(windows, settings.held_out, settings.seed)
        described = {
            "name_or_path": lasting_name(name),
            "model_type": host.config.model_type,
            "digest": key["host"],
            "layer": settings.layer,
            "max_length": settings.max_length,
        }
        config = _config(settings, host, rows[0]["patches"].shape[-1])
        config.host_config = described
        which = "last" if settings.layer == -1 else f"layer {settings.layer}"
        data = TrainingData(
            train=rows,
            held_out=held_out,
            task="features",
            description=f"hidden states ({which}) of {_named(name, host)}, {found.description}",
            facts={
                "text": found.description,
                "digest": found.digest,
                # A record is for others, who have no such folder.
                "host": {**described, "name_or_path": name_of_source(name) if name else None},
            },
            statistics=None
            if config.feature_norm == "none"
            else feature_statistics(windows_of(rows), config.feature_norm),
            companion=Companion(host, tokenizer, settings.layer) if settings.companion else None,
        )
        set_seed(settings.seed)
        return train(settings, config, data, work, callbacks)


def train_images(
    settings: ImageSettings, *, callbacks: Sequence[TrainerCallback] = ()
) -> GeolipResult:
    """Train a geolip of the patches of images; a share of the images is measured on.

    On the CPU equal settings give equal models, bit for bit, also where a run was stopped and goes
    on. Pixels stay in [-1, 1]: they are not normalised further.

    Args:
        settings: what, and for how long.
        callbacks: further ones of transformers.

    Raises:
        ValueError: settings that do not fit, a folder that holds something else, no images.
    """
    state = PartialState(cpu=settings.device == "cpu" or None)
    with claimed(settings, state) as work:
        config = settings.model_config()
        processor = GeolipImageProcessor.from_config(config)
        images = load_images(
            settings.images,
            processor,
            count=settings.count,
            held_out=settings.held_out,
            seed=settings.seed,
            dataset_config=settings.dataset_config,
            column=settings.image_column,
        )
        _check_channels(images.train[0]["pixel_values"].shape[0], config)
        require_same_data(work, {"images": images.digest}, state)
        data = TrainingData(
            train=images.train,
            held_out=images.held_out,
            task="images",
            description=images.description,
            facts={"image_size": config.image_size, "patch_size": config.patch_size},
            processor=processor,
        )
        set_seed(settings.seed)
        return train(settings, config, data, work, callbacks)


def _config(settings: FeatureSettings, host: PreTrainedModel, width: int) -> GeolipConfig:
    """Of the model; beside a causal host it is causal, too."""
    causal = settings.companion and is_causal_host(host)
    config = settings.model_config(patch_dim=width, **({"is_causal": True} if causal else {}))
    if settings.companion:
        # What cannot be saved in the end is said before it is trained.
        GeolipCompanionConfig(geolip=config, causal=causal, read_layer=settings.layer)
    return config


def _loaded(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        # Some kinds of these errors are made of more than words.
        raise OSError(
            f"host: expected a name or folder for {kind.__name__}, got {name!r}, which cannot be "
            f"loaded ({error})"
        ) from error


def _check_channels(found: int, config: GeolipConfig) -> None:
    if found != config.num_channels:
        raise ValueError(
            f"num_channels: expected {found}, as the images have, got {config.num_channels}. "
            "Leave it out, or give other images"
        )


def _named(name: str, host: PreTrainedModel) -> str:
    """A name on the Hub; of a folder or an object what it is."""
    if name and not Path(name).exists():
        return name
    return f"a host ({host.config.model_type}, {width_of(host.config)} dimensions)"


def _texts(settings: FeatureSettings, texts: Sequence[str] | None) -> Texts:
    if texts is not None:
        return texts_of(texts)
    return load_texts(
        settings.text_files,
        settings.dataset,
        dataset_config=settings.dataset_config,
        column=settings.text_column,
        count=settings.texts,
        seed=settings.seed,
    )

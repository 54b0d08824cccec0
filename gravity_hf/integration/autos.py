"""Makes transformers resolve every `gravity_<host>` model type, without importing any host."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE_PREFIX = "gravity_"


class _GravityConfigs(dict):
    """The registry's extra entries, with gravity configs made when they are first asked for."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _host_type(model_type) is not None

    def __missing__(self, model_type: str) -> type:
        host_type = _host_type(model_type)
        if host_type is None:
            raise KeyError(model_type)
        from .hosts import gravity_config_class

        self[model_type] = gravity_config_class(CONFIG_MAPPING[host_type])
        return self[model_type]


def _host_type(model_type: object) -> str | None:
    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE_PREFIX):
        return None
    host_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    return host_type if host_type in CONFIG_MAPPING._mapping else None


def register() -> None:
    """Install the lazy entries; calling it again changes nothing."""
    if not isinstance(CONFIG_MAPPING._extra_content, _GravityConfigs):
        CONFIG_MAPPING._extra_content = _GravityConfigs(CONFIG_MAPPING._extra_content)

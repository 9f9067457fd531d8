"""The parts that a configuration may name: every table is filled where its parts are defined.

    from vlmamba import registry

    @registry.connectors.add("pool")
    class Pool(nn.Module): ...

Tables: language_models (by the text configuration's model_type; what is in none of ours is a
causal language model of transformers), vision_encoders (by the vision configuration's model_type),
connectors, image_layouts and objectives (by name).  An unknown name is an error that lists the
known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vlmamba_core.errors import unknown
from vlmamba_core.names import choose

Part = TypeVar("Part")


class Registry(dict[str, Any]):
    """Parts of one kind by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, *names: str) -> Callable[[Part], Part]:
        """Decorate a class or function: it is the part called by each of `names`."""

        def register(part: Part) -> Part:
            for name in names:
                self[name] = part
            return part

        return register

    def choose(self, name: str) -> str:
        """The part's name as it was registered, for one in any case.

        Raises UserError, naming the known ones, unless there is such a part.
        """
        return choose(self.kind, name, self)

    def __missing__(self, name: str) -> Any:
        raise unknown(self.kind, name, self)


language_models = Registry("language model")
vision_encoders = Registry("vision encoder")
connectors = Registry("connector")
image_layouts = Registry("image layout")
objectives = Registry("objective")

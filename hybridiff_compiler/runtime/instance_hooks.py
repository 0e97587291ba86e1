"""Standing in for a method of one object, so that the object's copies and whoever else hooks it are left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["InstanceHook"]


class InstanceHook:
    """An attribute of `owner` in the place of its method `name`, from `put` until `remove`.

    Pipelines copy their schedulers (one for sound beside the one for pictures): a copy has its class's own method.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        """`call`: what is called instead."""
        functools.update_wrapper(self, getattr(owner, name))
        self._owner, self._name, self._call = owner, name, call
        self._before: dict[str, Any] = {}

    @classmethod
    def put(cls, owner: Any, name: str, call: Callable[..., Any]) -> InstanceHook:
        """Hook `owner.name`."""
        hook = cls(owner, name, call)
        hook._before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        owner.__dict__[name] = hook
        return hook

    def remove(self) -> None:
        """Put back what was there; a hook that somebody else put over this one stays, and so does this one below it."""
        if self._owner.__dict__.get(self._name) is self:
            del self._owner.__dict__[self._name]
            self._owner.__dict__.update(self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner))
        return self if copied is None else getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)

from quality.conftest import cheap_plan, exact_plan, profile

__all__ = ["cheap_plan", "exact_plan", "profile"]

"""Makes the bundled reference models: data, training, export, contact sheets.

Run it as `python -m tools.reference_models prepare|train|export|sheet --help`, from the repository root.
"""

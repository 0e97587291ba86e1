from tools.reference_models.export import export
from pathlib import Path
for n in ('unet','mmdit'): print(export(n,None,Path('.train'),Path('hybridiff_compiler/reference_models')))

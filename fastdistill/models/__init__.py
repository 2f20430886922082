"""What is done to a transformer. Importing it makes ``attn_implementation="fastdistill"`` known to transformers."""

from fastdistill.models import attention as attention

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a training needs beside the model: samples, packed batches, losses, what stays frozen, a `Trainer`."""

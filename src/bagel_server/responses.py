# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`/v1/responses`."""
from fastapi import APIRouter
router = APIRouter()

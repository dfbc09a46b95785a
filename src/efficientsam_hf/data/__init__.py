# SPDX-License-Identifier: Apache-2.0
"""Everything that ends in a batch: generated scenes, annotated pictures and prompts. Import the modules by name."""

# SPDX-License-Identifier: Apache-2.0
"""Publishing: a run becomes a folder with a card, and the folder a repository on the Hub."""

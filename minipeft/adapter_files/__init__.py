"""Adapters on disk, in the folder format of HF peft: JSON and safetensors."""

"""Making pictures: prompt lines, samplers, guidance, the denoising loop, files."""

"""DIFT and its relatives on tiny random networks: the code path is the real one, the weights are not."""

import types

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from thesis_lib.correspondence.cache import features  # noqa: E402
from thesis_lib.correspondence.diffusion import DiffusionFeatures, load_diffusion, prompt_encoder, unet_layers  # noqa: E402, I001
from thesis_lib.correspondence.evaluate import sweep  # noqa: E402
from thesis_lib.correspondence.hyperfeatures import Hyperfeatures, channels_of  # noqa: E402
from thesis_lib.correspondence.prompts import PromptMatcher, attention_maps, cross_attentions  # noqa: E402
from thesis_lib.correspondence.students import Student, tune  # noqa: E402
from thesis_lib.correspondence.training import train  # noqa: E402

WIDTH = 8  # of the prompt embeddings


@pytest.fixture(scope="module")
def networks():
    """Stable Diffusion's layout (four levels, cross-attention in three) with eight channels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    for network in (unet, vae):
        network.requires_grad_(False).eval()
    return unet, vae, diffusers.DDIMScheduler(num_train_timesteps=1000)


def encode(prompts):
    """An embedding of each prompt that depends on its letters."""
    rows = [torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts]
    return {"encoder_hidden_states": torch.cat(rows)}


def make(networks, **options) -> DiffusionFeatures:
    return DiffusionFeatures(*networks, encode, size=32, **options)


def test_layer_8_is_dift_up_block_1(networks):
    unet = networks[0]
    assert len(unet_layers(unet)) == 1 + 4 + 4 + 4 + 3
    extractor, seen = make(networks, layers=(0, 4, 8, 12)), {}
    hooks = [module.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o))
             for n, module in enumerate([unet.mid_block, *unet.up_blocks])]  # fmt: skip
    x = torch.rand(2, 3, 32, 32)
    found, _ = extractor._activations(torch.randn(2, 4, 16, 16), 261, encode(["a", "b"]), whole=True)
    for handle in hooks:
        handle.remove()
    assert all(torch.equal(found[layer], seen[n]) for n, layer in enumerate((0, 4, 8, 12)))
    assert make(networks, layers=(8,))(x, ["cat", "dog"])["8@261"].shape == (2, 16, 8, 8)


def test_the_prompt_names_the_category(networks):
    x = torch.rand(1, 3, 32, 32)
    extractor = make(networks)
    cat, dog = extractor(x, ["cat"])["8@261"], extractor(x, ["dog"])["8@261"]
    assert not torch.equal(cat, dog) and torch.equal(cat, extractor(x, ["cat"])["8@261"])


def test_an_image_does_not_depend_on_its_batch_and_a_pass_ends_early(networks):
    x = torch.rand(3, 3, 32, 32)
    extractor = make(networks, layers=(1,), ensemble=2)
    ran = []
    hook = networks[0].conv_out.register_forward_hook(lambda *_: ran.append(1))
    whole, alone = extractor(x, ["a", "b", "c"])["1@261"], extractor(x[1:2], ["b"])["1@261"]
    hook.remove()
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-4)
    assert not ran


def test_steps_and_ensembles_are_averages(networks):
    x, step = torch.rand(1, 3, 32, 32), {"steps": (100, 300), "average": True}
    maps = make(networks, **step)(x, ["a"])
    assert list(maps) == ["8@100", "8@300", "8@mean"]
    torch.testing.assert_close(maps["8@mean"], (maps["8@100"] + maps["8@300"]) / 2)
    one, four = (make(networks, ensemble=n, seed=3)(x, ["a"])["8@261"] for n in (1, 4))
    assert not torch.allclose(one, four)


def test_noise_is_that_of_the_sampler(networks):
    extractor = make(networks)
    latents, noise = torch.randn(1, 4, 16, 16), extractor._noise(torch.empty(1, 4, 16, 16), 0)
    alpha = extractor.alphas[261]
    ours = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(ours, networks[2].add_noise(latents, noise, torch.tensor([261])))


def test_inversion_is_ddim_backwards(networks):
    """One inverted step, then one of diffusers' sampler with the same prediction, is the identity."""
    unet, _, scheduler = networks
    extractor = make(networks, noise="invert", steps=(0, 500), inversion_steps=2)
    inputs = []
    hook = unet.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    z = torch.randn(1, 4, 16, 16)
    maps = extractor._inverted(z, encode(["a"]))
    hook.remove()
    prediction = unet(z, 0, **encode(["a"])).sample
    scheduler.set_timesteps(2)
    back = scheduler.step(prediction, 500, inputs[1], eta=0.0)
    clean = (z - (1 - extractor.alphas[0]).sqrt() * prediction) / extractor.alphas[0].sqrt()
    torch.testing.assert_close(back.pred_original_sample, clean.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert set(maps) == {"8@0", "8@500"}


def test_hyperfeatures_mix_layers_and_steps(networks, tmp_path):
    extractor = make(networks, layers=(1, 5), steps=(0, 500), noise="invert", inversion_steps=2)
    hyper = Hyperfeatures(extractor, channels_of(extractor), dim=16, grid=6)
    x = torch.rand(2, 3, 32, 32)
    found = hyper(x, ["a", "b"])["hyper"]
    assert found.shape == (2, 16, 6, 6)
    with torch.no_grad():
        hyper.mixing[0] = 100.0  # one source alone
    only = hyper(x, ["a", "b"])["hyper"]
    value = hyper.bottlenecks["1"](extractor(x, ["a", "b"])["1@0"])
    torch.testing.assert_close(only, torch.nn.functional.interpolate(value, (6, 6), mode="bilinear"))
    hyper.save(tmp_path / "a.safetensors")
    other = Hyperfeatures(extractor, channels_of(extractor), dim=16, grid=6)
    other.load(tmp_path / "a.safetensors")
    assert other.describe() == hyper.describe()
    with pytest.raises(ValueError, match="other layers, steps or widths"):
        Hyperfeatures(extractor, channels_of(extractor), dim=32, grid=6).load(tmp_path / "a.safetensors")


def test_the_sweep_has_a_row_a_layer_and_step(networks, pairs, tmp_path):
    extractor = make(networks, layers=(1, 8), steps=(101, 261))
    with features(extractor, pairs.images, categories=pairs.categories, folder=tmp_path, progress=False) as maps:
        rows = sweep(pairs, maps)
    assert [(r["layer"], r["column"]) for r in rows] == [(1, "101"), (1, "261"), (8, "101"), (8, "261")]


@pytest.mark.parametrize("how", ["full", "lora", "upsampler"])
def test_a_unet_is_tuned(networks, pairs, how):
    import copy

    student = tune(Student(make((copy.deepcopy(networks[0]), *networks[1:]), layers=(4,))), how, rank=2, factor=2)
    assert any(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in student.extractor.vae.parameters())
    assert not any(p.requires_grad for p in student.extractor.unet.up_blocks[3].parameters())  # after the map
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    log = train(student, pairs, pixels, epochs=1, batch_size=2, lr=1e-3, device="cpu", progress=False)
    assert np.isfinite(log[0]["loss"])


def test_prompt_optimisation_moves_attention_to_the_point(networks, pairs):
    unet = networks[0]
    assert len(cross_attentions(unet)) == 9
    model = make(networks)
    options = {"layers": (5, 8), "steps": 12, "lr": 0.1, "sigma": 5.0, "rounds": 1, "crops": 2, "tokens": 5}
    matcher = PromptMatcher(pairs, model, crop=1.0, **options)
    image, point = matcher._image(0), torch.tensor([8.0, 24.0])
    prompt = matcher.optimise(image, point, torch.Generator().manual_seed(0))
    random = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    share = []
    for embedding in (random, prompt):
        heat = matcher.attend(image, embedding, torch.Generator().manual_seed(1))
        assert heat.shape == (32, 32)
        share.append((heat[20:28, 4:12].sum() / heat.sum()).item())
    assert share[1] > share[0]
    quick = PromptMatcher(pairs, model, **options | {"steps": 1, "crops": 1})
    pair = pairs.pairs[0]
    one = {"keypoints": ("0",), "source_points": pair.source_points[:1], "target_points": pair.target_points[:1]}
    pair = type(pair)(**vars(pair) | one)
    found = quick(pair)
    assert found.shape == (1, 2) and (found < [40, 30]).all() and np.array_equal(found, quick(pair))


def test_attention_maps_average_to_one_over_the_tokens(networks):
    """Summed over tokens the attention of a cell is one; the steered token's share stands in its place."""
    unet = networks[0]
    noisy, prompt = torch.randn(2, 4, 16, 16), torch.zeros(1, 5, WIDTH)
    found = attention_maps(unet, noisy, 141, prompt, (5, 6), 32)
    torch.testing.assert_close(found, torch.full((2, 32, 32), 1 / 5))


def test_prompts_are_encoded_once_and_xl_gets_its_pooled_embedding():
    calls = []

    def encode_prompt(prompt, device, num_images_per_prompt, do_classifier_free_guidance):
        calls.append(prompt)
        return torch.full((1, 5, WIDTH), float(len(calls))), None, torch.ones(1, 3), None

    unet = types.SimpleNamespace(config=types.SimpleNamespace(sample_size=128))
    pipeline = types.SimpleNamespace(encode_prompt=encode_prompt, device="cpu", unet=unet, vae_scale_factor=8)
    made = prompt_encoder(pipeline)
    condition = made(["cat", "dog", "cat"])
    assert calls == ["cat", "dog"] and condition["encoder_hidden_states"][:, 0, 0].tolist() == [1, 2, 1]
    assert condition["added_cond_kwargs"]["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 3


def test_wrong_layers_steps_and_missing_weights_are_named(networks):
    with pytest.raises(ValueError, match=r"layers \[16\] are not among the U-Net's 0 to 15"):
        make(networks, layers=(16,))
    with pytest.raises(ValueError, match=r"time steps \[1000\]"):
        make(networks, steps=(1000,))
    with pytest.raises(ValueError, match="did you mean 'invert'"):
        make(networks, noise="inver")
    with pytest.raises(FileNotFoundError, match="not present. Published at huggingface.co/nobody/nothing"):
        load_diffusion("nobody/nothing")

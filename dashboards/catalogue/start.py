"""Words of the page Start."""

WORDS = {
    "start.nav": ("Start", "はじめに"),
    "start.title": ("diffplan", "diffplan"),
    "start.lead": (
        "Which GPUs should run what — and is decoupling the add-ons worth it?",
        "どのGPUで何を動かすか。アドオンの分離は割に合うか。",
    ),
    "start.what": (
        "Text-to-image services run SDXL with add-ons: ControlNets steer the image, LoRAs change its style. diffplan replays a trace of requests "
        "through a simulator whose latencies were measured on real GPUs, lets four ways to run the service compete, and recommends the cheapest "
        "fleet that keeps your promise — or says what stands in the way.",
        "画像生成サービスはSDXLにアドオンを組み合わせて動きます。ControlNetは構図を、LoRAは画風を変えます。diffplanは、実機のGPUで測ったレイテンシを使って"
        "リクエストのトレースをシミュレートし、4つの構成を比べて、目標を守る最も安い構成を推奨します。守れない場合は、その理由を示します。",
    ),
    "start.samples": ("Load a sample", "サンプルを読み込む"),
    "start.load": ("Load", "読み込む"),
    "start.loaded": (
        "Loaded **{name}**. The pages on the left now answer for it.",
        "**{name}** を読み込みました。左の各ページはこのサンプルについて答えます。",
    ),
    "start.promise": ("Promise: {share} % within {latency} s.", "目標: {share}%を{latency}秒以内。"),
    "start.sample.small": (
        "A few GPUs: half of the requests of half an hour of Katz service A (synthetic, after published figures), nearly all with ControlNets and two LoRAs. Plans in seconds.",
        "GPU数台の小さなサービス。KatzのサービスAの30分を半分に間引いた合成トレース（公表された統計に基づく）。ほぼ全リクエストがControlNetと2つのLoRAを使います。計画は数秒で終わります。",
    ),
    "start.sample.provider": (
        "A provider at about 30 GPUs: Katz service B (synthetic), most requests with one or two ControlNets and a LoRA.",
        "GPU約30台の事業者。KatzのサービスB（合成）。多くのリクエストが1〜2個のControlNetとLoRAを使います。",
    ),
    "start.sample.provider_fast": (
        "The same traffic with a promise of three seconds, which ControlNets in line cannot keep.",
        "同じトラフィックで目標を3秒にしたもの。ControlNetを直列に動かすと守れません。",
    ),
    "start.next": ("Then", "次に"),
    "start.step.traffic": (
        "What arrives: rates, bursts, add-ons, what a cache would hold; where time goes today.",
        "何が届くか: 到着率、集中、アドオン、キャッシュの効果。今どこに時間がかかっているか。",
    ),
    "start.step.plan": (
        "The recommendation, with its evidence, over several repetitions.",
        "推奨構成とその根拠（複数回の反復による）。",
    ),
    "start.step.what_if": (
        "Move traffic, promise, price and GPUs, and see at once what happens.",
        "トラフィック・目標・価格・GPU数を動かし、結果をすぐに確かめます。",
    ),
    "start.step.roi": ("What it saves, what it costs, and when it pays.", "節約額、費用、回収時期。"),
    "start.step.export": (
        "Files to take away: reports, tables, cluster files.",
        "レポート、表、クラスタ用ファイルのダウンロード。",
    ),
    "start.measured": ("What has been measured", "実測したもの"),
    "start.no_profile": (
        "Choose a usable question in the sidebar to see what its profile measured.",
        "サイドバーで有効な条件を選ぶと、そのプロファイルの実測内容を表示します。",
    ),
    "start.gpu": ("GPU kind", "GPUの種類"),
    "start.laws": ("Laws measured", "実測した法則"),
    "start.laws.help": (
        "Latency laws with measurements of their own, of all laws; the others are assumed, with their source.",
        "全レイテンシ則のうち実測に基づくもの。ほかは出典を付けた仮定です。",
    ),
    "start.repetitions": ("Timed repetitions", "計測回数"),
    "start.repetitions.help": (
        "Raw repetitions behind the measured laws.",
        "実測した法則のもとになった計測の回数です。",
    ),
    "start.held_out": ("Mean gap, whole images", "画像全体での平均誤差"),
    "start.held_out.help": (
        "Mean absolute gap between composed and timed seconds over {n} kinds of whole images that nothing was fitted to.",
        "当てはめに使っていない{n}種類の画像について、法則から組み立てた秒数と実測の差の絶対値の平均です。",
    ),
    "start.images.alt": (
        "Seconds per whole image, by add-ons and topology",
        "アドオンと構成ごとの画像1枚あたりの秒数",
    ),
    "start.images.note": (
        "Seconds per image as timed, nobody waiting. The page Accuracy has every comparison.",
        "待ちがない状態で計測した画像1枚あたりの秒数。すべての比較は「精度」ページにあります。",
    ),
    "start.image": ("ControlNets {controlnets}, LoRAs {loras}", "ControlNet {controlnets}個、LoRA {loras}個"),
}

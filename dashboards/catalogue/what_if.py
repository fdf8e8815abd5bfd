"""Words of the page What-if."""

WORDS = {
    "what_if.nav": ("What if", "もしも"),
    "what_if.title": ("What if?", "条件を動かしてみる"),
    "what_if.lead": (
        "Every move of a slider simulates the fleets at hand once. The page Plan gives intervals over several repetitions.",
        "スライダーを動かすたびに、手元の構成を1回ずつシミュレートします。信頼区間は「計画」ページで求めます。",
    ),
    "what_if.laying_out": ("Laying the traffic out…", "トラフィックを準備しています…"),
    "what_if.cannot": (
        "This cannot be answered while a slider moves.",
        "この条件にはスライダーの操作中に答えられません。",
    ),
    "what_if.not_modelled": (
        "This question uses what only the full simulator has: make a plan instead.",
        "この条件は詳細なシミュレータでしか扱えません。「計画」ページを使ってください。",
    ),
    "what_if.baseline": ("Baseline", "基準"),
    "what_if.baseline.help": (
        "What you compare with; its fleet stays as it is.",
        "比較の相手です。台数は変わりません。",
    ),
    "what_if.topology": ("Candidate", "候補"),
    "what_if.topology.help": (
        "The fleet that the two sliders below change.",
        "下の2つのスライダーで台数を変える構成です。",
    ),
    "what_if.wt": ("Traffic (times the question's)", "トラフィック（条件の何倍か）"),
    "what_if.wt.help": (
        "More or fewer time-shifted copies of the trace.",
        "時間をずらして重ねるトレースの量を変えます。",
    ),
    "what_if.ws": ("Promised latency (s)", "目標レイテンシ（秒）"),
    "what_if.ws.help": ("From arrival to image, waiting included.", "到着から画像まで。待ち時間を含みます。"),
    "what_if.wp": ("GPU price (USD per GPU-hour)", "GPU単価（USD／GPU・時間）"),
    "what_if.wp.help": ("The same for all GPUs.", "すべてのGPUに共通です。"),
    "what_if.wc": ("ControlNet requests that keep them (%)", "ControlNetを使い続けるリクエスト（%）"),
    "what_if.wc.help": (
        "Share of the requests with ControlNets that keep them; the others ask for the plain image. Disabled where nobody uses any.",
        "ControlNetを使うリクエストのうち使い続ける割合。残りはControlNetなしで生成します。使うリクエストがなければ操作できません。",
    ),
    "what_if.wn": ("Base GPUs of {topology} (GPUs)", "{topology}のベースGPU（台）"),
    "what_if.wn.help": ("Replicas of the base model, one GPU each.", "ベースモデルのレプリカ数（1台ずつ）。"),
    "what_if.wk": ("ControlNet GPUs of {topology} (GPUs)", "{topology}のControlNet用GPU（台）"),
    "what_if.wk.help": (
        "ControlNet workers, one GPU each; several pools keep their proportion.",
        "ControlNetワーカーの数（1台ずつ）。プールが複数あれば比率を保ちます。",
    ),
    "what_if.wk.none": ("ControlNet GPUs (GPUs)", "ControlNet用GPU（台）"),
    "what_if.wk.none.help": (
        "This topology runs ControlNets on the base GPUs, or the traffic has none.",
        "この構成はControlNetをベースGPU上で動かすか、トラフィックにControlNetがありません。",
    ),
    "what_if.took": (
        "{runs} fleets, {n} requests each, one run each: computed in {ms} ms.",
        "{runs}構成を各{n}件・各1回シミュレート: 計算時間{ms}ミリ秒。",
    ),
    "what_if.binds": ("What binds", "制約"),
    "what_if.bottleneck.pool": (
        "the busiest pool is {pool}, {busy} busy: it binds next",
        "最も忙しいのは{pool}（稼働{busy}）で、次の制約になります",
    ),
    "what_if.bottleneck.saturated": (
        "overloaded: more arrives than it can serve, so its times grow with the length of the window",
        "過負荷です。処理できる以上に届くため、時間は対象期間が長いほど延びます",
    ),
    "what_if.bottleneck.room": (
        "no pool is half busy (the busiest, {pool}, is {busy} busy): bursts, not load, decide the size",
        "どのプールも稼働が半分未満です（最大の{pool}で{busy}）。台数を決めるのは負荷ではなく集中です",
    ),
    "what_if.bottleneck.idle": (
        "the images themselves take too long, even on an idle fleet: no number of GPUs helps",
        "空いていても画像1枚に時間がかかりすぎます。台数を増やしても改善しません",
    ),
    "what_if.bottleneck.queue_wait_s": (
        "late requests wait for a base replica: more of them help",
        "遅れの主因はベースの空き待ちです。ベースを増やすと改善します",
    ),
    "what_if.bottleneck.switch_s": (
        "late requests wait for checkpoints to be switched",
        "遅れの主因はチェックポイントの切り替えです",
    ),
    "what_if.bottleneck.controlnet_load_s": (
        "late requests wait for ControlNets to be loaded",
        "遅れの主因はControlNetのロードです",
    ),
    "what_if.bottleneck.lora_wait_s": (
        "late requests wait for LoRAs",
        "遅れの主因はLoRAの待ちです",
    ),
    "what_if.bottleneck.denoise_s": (
        "late requests share ControlNet workers: more of those help",
        "遅れの主因はControlNetワーカーの共有です。ワーカーを増やすと改善します",
    ),
    "what_if.side_by_side": ("Baseline and candidate side by side", "基準と候補の比較"),
    "what_if.difference": ("Difference", "差"),
    "what_if.points": ("percentage points", "ポイント"),
    "what_if.frontier": ("Cost against latency", "費用とレイテンシ"),
    "what_if.frontier.note": (
        "Down and left is better. The ring is the candidate; the dotted line is the candidate with fewer and more base GPUs; hollow points miss the promise. "
        "Fleets slower than four times the promise are in the table only.",
        "左下ほど良い結果です。輪は候補、点線は候補のベースGPUを増減したもの、白抜きは目標未達です。目標の4倍より遅い構成は表にだけ示します。",
    ),
    "what_if.frontier.words": (
        "Cost a month against 95th percentile latency. At hand: {points}. The candidate, {name} on {n} × GPU, takes {latency} seconds and {cost} dollars. The promise is {promise} seconds.",
        "月額費用と95パーセンタイルのレイテンシ。手元の構成: {points}。候補は{name}（GPU {n}台）で{latency}秒、{cost}ドル。目標は{promise}秒です。",
    ),
    "what_if.point_words": (
        "{name} on {n} × GPU at {latency} seconds and {cost} dollars ({verdict})",
        "{name}（GPU {n}台）は{latency}秒、{cost}ドル（{verdict}）",
    ),
    "what_if.more_or_fewer": ("{name}, fewer and more GPUs", "{name}の台数を増減"),
    "what_if.choice": ("candidate, {n} × GPU", "候補、GPU {n}台"),
    "what_if.all": ("The fleets at hand", "手元の構成"),
    "what_if.search": ("Search again under these conditions", "この条件で探索し直す"),
    "what_if.search.note": (
        "The fleets above keep their sizes while you move the sliders. A search finds the cheapest fleet of every topology anew, over several repetitions.",
        "上の構成の台数はスライダーを動かしても変わりません。探索すると、構成ごとに最も安い台数を反復つきで求め直します。",
    ),
    "what_if.search.button": ("Search again", "探索し直す"),
    "what_if.adopt": ("Make this the question of all pages", "この条件を全ページで使う"),
    "what_if.adopt.help": (
        "Puts traffic, promise and price of the sliders into the side bar.",
        "スライダーのトラフィック・目標・価格をサイドバーに反映します。",
    ),
    "what_if.take": ("Take these fleets", "この構成を手元の構成にする"),
    "what_if.take.help": (
        "The sizes that the search found become the fleets at hand.",
        "探索で見つかった台数を手元の構成にします。",
    ),
}

"""Words of the page Time line."""

WORDS = {
    "timeline.nav": ("Time line", "時系列"),
    "timeline.title": ("What happens over time", "時間とともに何が起こるか"),
    "timeline.lead": (
        "The recommended fleet in one simulated repetition: who waits, which GPUs work, and one request's life.",
        "推奨構成の1回分のシミュレーションです。待ち行列、GPUの稼働、リクエスト1件の流れを示します。",
    ),
    "timeline.none": (
        "Nothing is recommended, so no run was kept. The page Plan says what binds.",
        "推奨がないため、実行の記録はありません。制約は「計画」のページに示しています。",
    ),
    "timeline.too_long": (
        "This run has too many requests to be kept on this page. “diffplan plan” on the downloaded scenario writes requests.parquet and "
        "workers.parquet, and “diffplan simulate --chrome-trace” a trace that Perfetto opens.",
        "リクエスト数が多いため、この画面には実行の記録を保存していません。ダウンロードしたシナリオで「diffplan plan」を実行すると"
        "requests.parquetとworkers.parquetが、「diffplan simulate --chrome-trace」を実行するとPerfettoで開けるトレースが得られます。",
    ),
    "timeline.window": ("Part of the run (%)", "表示する範囲（%）"),
    "timeline.window.help": (
        "All charts show this part; 0 is the first arrival, 100 the last event. Slots are a hundredth of it or more.",
        "すべての図がこの範囲を示します。0が最初の到着、100が最後の出来事です。",
    ),
    "timeline.slot": (
        "Slots of {slot}; from {begin} to {end} of a run of {whole}.",
        "1区間は{slot}です。全体{whole}のうち{begin}から{end}までを表示しています。",
    ),
    "timeline.queue": ("Who waits", "待っているリクエスト"),
    "timeline.queue.mean": ("mean of the slot", "区間の平均"),
    "timeline.queue.most": ("most at once", "区間の最大"),
    "timeline.queue.axis": ("Waiting requests", "待っているリクエスト数"),
    "timeline.queue.words": (
        "Waiting requests: {mean} on average, at most {most}, which is at {at}. {late} of the requests that arrive here are late.",
        "待っているリクエストは平均{mean}件、最大{most}件（{at}時点）です。この範囲に到着したリクエストのうち{late}が目標に遅れました。",
    ),
    "timeline.busy": ("Which GPUs work", "GPUの稼働"),
    "timeline.busy.axis": ("Busy (% of allocated time)", "稼働率（割り当て時間に対する%）"),
    "timeline.busy.loading": ("{pool}, loading models", "{pool}（モデルのロード）"),
    "timeline.busy.words": ("Busy share of each pool: {pools}.", "プールごとの稼働率: {pools}。"),
    "timeline.busy.pool": (
        "{pool} {mean} on average, {most} in its busiest slot",
        "{pool}は平均{mean}、最も忙しい区間で{most}",
    ),
    "timeline.demand": ("Base replicas against demand", "ベースのレプリカ数と需要"),
    "timeline.demand.axis": ("Base replicas", "ベースのレプリカ数"),
    "timeline.demand.asked": ("asked for by arrivals", "到着したリクエストの需要"),
    "timeline.demand.there": ("there", "割り当て済み"),
    "timeline.demand.words": (
        "The arrivals ask for {mean} base replicas on average and {most} in the busiest slot; {there} are there. In {share} of the slots more "
        "is asked for than there is: then the queue grows.",
        "到着したリクエストの需要は平均{mean}、最も忙しい区間で{most}レプリカ分で、割り当ては{there}です。需要が割り当てを上回るのは"
        "区間の{share}で、そのとき待ち行列が伸びます。",
    ),
    "timeline.time.s": ("Time (s)", "時刻（秒）"),
    "timeline.time.min": ("Time (min)", "時刻（分）"),
    "timeline.time.h": ("Time (h)", "時刻（時間）"),
    "timeline.time.d": ("Time (days)", "時刻（日）"),
    "timeline.unit.s": ("{value} s", "{value}秒"),
    "timeline.unit.min": ("{value} min", "{value}分"),
    "timeline.unit.h": ("{value} h", "{value}時間"),
    "timeline.unit.d": ("{value} days", "{value}日"),
    "timeline.life": ("One request's life", "リクエスト1件の流れ"),
    "timeline.life.choose": ("Request, the slowest first", "リクエスト（遅い順）"),
    "timeline.life.other": ("Another request's id", "ほかのリクエストのID"),
    "timeline.life.other.help": (
        "Empty: the one chosen at the left. Ids are in requests.parquet.",
        "空欄なら左で選んだリクエストです。IDはrequests.parquetにあります。",
    ),
    "timeline.life.unknown": ("This run has no such request.", "この実行にそのリクエストはありません。"),
    "timeline.life.not_done": ("It got no image: {status}. {reason}", "画像は返りませんでした: {status}。{reason}"),
    "timeline.life.axis": ("Seconds after arrival", "到着からの秒数"),
    "timeline.life.words": (
        "Request {name} takes {latency} s: {stages}.",
        "リクエスト{name}は{latency}秒かかりました: {stages}。",
    ),
    "timeline.life.promise": ("promise {latency} s", "目標 {latency}秒"),
    "timeline.life.about": (
        "On {worker} with {topology}. Images {images}, steps {steps}, ControlNets {controlnets}, LoRAs {loras}. Arrived at {at}.",
        "{worker}（{topology}）で処理。画像{images}枚、{steps}ステップ、ControlNet {controlnets}個、LoRA {loras}個。到着は{at}。",
    ),
    "timeline.life.alt": ("Seconds of each stage of the request", "リクエストの段階ごとの秒数"),
    "timeline.stage": ("Stage", "段階"),
    "timeline.seconds": ("Seconds", "秒"),
    "timeline.share": ("Share", "割合"),
    "stage.queue": ("waiting for a replica", "レプリカ待ち"),
    "stage.switch": ("switching checkpoints", "チェックポイントの切り替え"),
    "stage.controlnet_load": ("loading ControlNets", "ControlNetのロード"),
    "stage.lora": ("fetching and patching LoRAs", "LoRAの取得と適用"),
    "stage.text": ("text encoding", "テキストのエンコード"),
    "stage.denoise": ("denoising", "デノイズ"),
    "stage.sharing": ("waiting for shared ControlNet workers", "共有ControlNetワーカー待ち"),
    "stage.decode": ("decoding", "デコード"),
    "stage.other": ("everything else", "その他"),
}
